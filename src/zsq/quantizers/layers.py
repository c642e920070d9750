# SPDX-License-Identifier: Apache-2.0
"""A layer of the student: the teacher's operator with a weight quantizer in place of the weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zsq.quantizers.weight import FrozenWeight
from zsq.teacher.layers import Layer, is_depthwise, resolve_operator


class QuantizedLayer(nn.Module):
    """A convolution or linear layer whose weight comes from a weight quantizer.

    Args:
        operator: ATen operator, as in `zsq.teacher.layers.Layer`.
        arguments: what follows the bias in the operator's signature.
        weight: a weight quantizer module.
        bias: (C_out,) or None.
    """

    weight: nn.Module
    bias: nn.Parameter | None

    def __init__(
        self, operator: str, arguments: tuple[Any, ...], weight: nn.Module, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.operator = operator
        self.arguments = arguments
        self.weight = weight
        kept = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", kept)
        self._call = resolve_operator(operator)

    @classmethod
    def of(cls, layer: Layer, weight: nn.Module) -> QuantizedLayer:
        """Build the quantized form of ``layer``."""
        return cls(layer.operator, layer.arguments, weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (N, C_in, ...)."""
        return self.apply_weight(x, self.weight())

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the layer with a weight that was computed already."""
        return self._call(x, weight, self.bias, *self.arguments)  # type: ignore[no-any-return]

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return int(self.weight.bits)  # type: ignore[arg-type]

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel is a convolution of one input channel of its own."""
        return is_depthwise(self.weight.codes().shape, self.arguments)  # type: ignore[operator]

    def freeze(self) -> None:
        """Replace what is being tuned by the integers it settled on; harmless when done already."""
        if not isinstance(self.weight, FrozenWeight):
            self.weight = self.weight.freeze()  # type: ignore[operator]

    @property
    def frozen(self) -> FrozenWeight:
        """The integer weight.

        Raises:
            TypeError: the layer is still being tuned.
        """
        if not isinstance(self.weight, FrozenWeight):
            raise TypeError(
                f"the layer's weight is still a {type(self.weight).__name__}; freeze() it first."
            )
        return self.weight

    @torch.no_grad()
    def snap_bias(self, input_scale: Tensor) -> None:
        """Round the bias to the grid of the accumulator, ``input_scale * weight scale[c]``.

        A runtime keeps the bias as 32-bit integers on that grid; without this its results would
        differ from the simulation's.
        """
        if self.bias is not None:
            step = (input_scale * self.weight.scale).double()  # type: ignore[operator]
            self.bias.copy_(torch.round(self.bias.double() / step).mul(step))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        """Copy the layer; operators are singletons that cannot be deep-copied themselves."""
        copied = QuantizedLayer(
            self.operator, self.arguments, copy.deepcopy(self.weight, memo), self.bias
        )
        copied.train(self.training)
        for name, child in self.named_children():  # modules nested below the layer's path
            if name != "weight":
                copied.add_module(name, copy.deepcopy(child, memo))
        memo[id(self)] = copied
        return copied

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.operator.split('.')[1]}, {self.arguments}"
