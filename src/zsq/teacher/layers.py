# SPDX-License-Identifier: Apache-2.0
"""The leaf modules of a network: weight-bearing layers and batch norms, as the graph calls them.

A `Layer` keeps the very ATen operator that the user's module called, with its stride, padding and
the rest, so 1-D, 2-D and 3-D convolutions, ``padding="same"`` and linear layers need no case each.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from zsq.errors import UsageError
from zsq.teacher.gate import refusal

#: Operators whose second argument is a weight with output channels on axis 0.
LAYER_OPERATORS = frozenset({
    "aten.conv1d.default", "aten.conv1d.padding", "aten.conv2d.default", "aten.conv2d.padding",
    "aten.conv3d.default", "aten.conv3d.padding", "aten.linear.default",
})  # fmt: skip
#: Python operators that appear on sizes in an exported graph.
SCALAR_OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem")
}


def operator_name(target: object) -> str:
    """Name an operator as it is written to file: ``aten.add.Tensor`` or ``operator.mul``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, function in SCALAR_OPERATORS.items():
        if function is target:
            return name
    return str(target)


def is_view(node: Node) -> bool:
    """Return whether a node's result shares memory with its input, by the operator's own schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns and returns[0].alias_info and not returns[0].alias_info.is_write)


def is_inplace(node: Node) -> bool:
    """Return whether a node writes into its first argument, by the operator's own schema."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(
        target._schema.arguments
        and target._schema.arguments[0].alias_info
        and target._schema.arguments[0].alias_info.is_write
    )


def out_of_place(name: str) -> str:
    """Name the operator that returns what ``name`` writes in place.

    Example:
        >>> out_of_place("aten.relu_.default")
        'aten.relu.default'
    """
    return re.sub(r"^(aten\.\w+?)_\.", r"\1.", name)


def resolve_operator(name: str) -> Callable[..., Any]:
    """Find the operator that a name stands for, refusing whatever is not plain tensor arithmetic.

    Networks are read from files, so this is the gate: only the ATen operators that `zsq.teacher.gate` lets
    pass and the integer operators of `SCALAR_OPERATORS` do.

    Args:
        name: ``aten.<operator>.<overload>`` or ``operator.<name>``.

    Raises:
        UsageError: the name is unknown or not allowed.

    Example:
        >>> resolve_operator("aten.relu.default")(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    if name in SCALAR_OPERATORS:
        return SCALAR_OPERATORS[name]
    match = re.fullmatch(r"aten\.(\w+)\.(\w+)", name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    overload = getattr(packet, match[2], None) if match and packet else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise UsageError(
            f"the network calls the operator {name!r}, which this PyTorch ({torch.__version__}) "
            "does not have among its standard (aten) operators; rewrite that part of the network "
            "with standard torch functions."
        )
    reason = refusal(overload)
    if reason is not None:
        raise UsageError(
            f"the network calls the operator {name!r}, which {reason} and is refused, as it could do harm; rewrite "
            "that part of the network with standard tensor functions."
        )
    return overload


def check_float32(path: str, weight: Tensor) -> None:
    """Refuse a layer that computes in anything but float32.

    Raises:
        UsageError: says which layer.
    """
    if weight.dtype != torch.float32:
        raise UsageError(
            f"the layer {path!r} computes in {str(weight.dtype).removeprefix('torch.')}; zsq needs "
            "float32. Take autocast and half precision out of the model's forward."
        )


def group_count(arguments: Sequence[Any]) -> int:
    """Return a convolution's number of groups from what follows the bias in its operator; else 1."""
    return int(arguments[3]) if len(arguments) > 3 else 1


def is_depthwise(shape: Sequence[int], arguments: Sequence[Any]) -> bool:
    """Return whether every output channel of a layer is a convolution of one input channel of its own.

    Args:
        shape: of its weight, (C_out, C_in / groups, ...).
        arguments: what follows the bias in its operator.
    """
    groups = group_count(arguments)
    return groups > 1 and tuple(shape[:2]) == (groups, 1)


class Layer(nn.Module):
    """A convolution or linear layer: one ATen operator with its weight, bias and settings.

    Args:
        operator: one of `LAYER_OPERATORS`.
        weight: (C_out, ...) float tensor.
        bias: (C_out,) float tensor or None.
        arguments: what follows the bias in the operator's signature (stride, padding, ...).
    """

    def __init__(
        self, operator: str, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...] = ()
    ) -> None:
        super().__init__()
        self.operator = operator
        self.arguments = arguments
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._call = resolve_operator(operator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (N, C_in, ...)."""
        return self.apply_weight(x, self.weight, self.bias)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer's operator with another weight and bias."""
        return self._call(x, weight, bias, *self.arguments)  # type: ignore[no-any-return]

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear layer (not a convolution)."""
        return self.operator == "aten.linear.default"

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride per spatial axis; ones for a linear layer."""
        spatial = self.weight.ndim - 2
        if self.is_linear or not self.arguments:
            return (1,) * spatial
        stride = tuple(self.arguments[0])
        return stride * spatial if len(stride) == 1 else stride

    @property
    def groups(self) -> int:
        """Number of groups of the convolution; 1 for a linear layer."""
        return group_count(self.arguments)

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel is a convolution of one input channel of its own."""
        return is_depthwise(self.weight.shape, self.arguments)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        kind = self.operator.split(".")[1]
        shape, bias = tuple(self.weight.shape), self.bias is not None
        return f"{kind}, weight={shape}, bias={bias}, {self.arguments}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        """Copy the layer; operators are singletons that cannot be deep-copied themselves."""
        return self._rebuilt(memo)

    def _rebuilt(self, memo: dict[int, Any]) -> Layer:
        copied = Layer(self.operator, self.weight, self.bias, self.arguments)
        copied.requires_grad_(self.weight.requires_grad).train(self.training)
        for name, child in self.named_children():  # modules nested below the layer's path
            copied.add_module(name, copy.deepcopy(child, memo))
        memo[id(self)] = copied
        return copied


class BatchNorm(nn.Module):
    """Batch norm with stored statistics, always applied in eval mode.

    Args:
        weight: gamma, (C,) or None.
        bias: beta, (C,) or None.
        running_mean: (C,).
        running_var: (C,), biased as torch stores it.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> None:
        super().__init__()
        gamma = torch.ones_like(running_mean) if weight is None else weight
        beta = torch.zeros_like(running_mean) if bias is None else bias
        self.weight = nn.Parameter(gamma.detach().clone())
        self.bias = nn.Parameter(beta.detach().clone())
        self.register_buffer("running_mean", running_mean.detach().clone())
        self.register_buffer("running_var", running_var.detach().clone())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (N, C, ...) with the stored statistics."""
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            False,
            0.0,
            self.eps,
            False,
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the affine map (scale, shift), each (C,), that this batch norm computes."""
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def extra_repr(self) -> str:
        """Describe the batch norm in one line."""
        return f"{self.running_mean.numel()} channels, eps={self.eps}"
