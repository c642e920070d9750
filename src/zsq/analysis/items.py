# SPDX-License-Identifier: Apache-2.0
"""A student taken apart: each weight and each edge, quantized alone or left out alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.quantizers.layers import QuantizedLayer
from zsq.student import Student
from zsq.teacher.layers import BatchNorm, Layer


class FloatWeight(nn.Module):
    """A weight that is not quantized, where a weight quantizer is expected."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.bits = 32
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.weight


class Dissection:
    """A student and its float twin, item by item.

    An item is a layer's weight or an activation quantizer. Both networks are copies: nothing that is
    tried here reaches the student.

    Args:
        student: frozen.
        network: the float network that it was made from, with the same graph.
    """

    def __init__(self, student: Student, network: GraphModule) -> None:
        self.quantized = student.copy()
        self.float = student.copy()
        self.originals: dict[str, FloatWeight] = {}  # part of the twin: they go where it goes
        for path, layer in self.float.layers().items():
            original = network.get_submodule(path)
            assert isinstance(original, Layer)
            self.originals[path] = layer.weight = FloatWeight(original.weight)
            if layer.bias is not None and original.bias is not None:
                layer.bias.data.copy_(original.bias)
        for path, module in self.float.network.named_modules():
            if isinstance(module, BatchNorm):  # fine-tuning learns their affine maps
                module.load_state_dict(network.get_submodule(path).state_dict())
        for quantizer in self.float.quantizers().values():
            quantizer.enabled = False

    @contextmanager
    def only(self, kind: str, name: str) -> Iterator[Student]:
        """Yield the float twin with one item quantized."""
        if kind == "edge":
            quantizer = self.float.quantizer(name)
            quantizer.enabled = True
            try:
                yield self.float
            finally:
                quantizer.enabled = False
        else:
            with _swapped(self.float.layers()[name], self.quantized.layers()[name].weight):
                yield self.float

    @contextmanager
    def without(self, kind: str, name: str) -> Iterator[Student]:
        """Yield the student with one item left float."""
        if kind == "edge":
            quantizer = self.quantized.quantizer(name)
            quantizer.enabled = False
            try:
                yield self.quantized
            finally:
                quantizer.enabled = True
        else:
            with _swapped(self.quantized.layers()[name], self.originals[name]):
                yield self.quantized


@contextmanager
def _swapped(layer: QuantizedLayer, weight: nn.Module) -> Iterator[None]:
    kept = layer.weight
    layer.weight = weight
    try:
        yield
    finally:
        layer.weight = kept


def signal_to_noise(x: Tensor, rounded: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels; infinite without noise.

    Example:
        >>> round(signal_to_noise(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 0.9])), 3)
        20.0
    """
    noise = (x - rounded).double().square().mean()
    if float(noise) == 0:
        return float("inf")
    return float(10 * torch.log10(x.double().square().mean() / noise))
