# SPDX-License-Identifier: Apache-2.0
"""An integer student computed the way an integer runtime computes it.

Fake quantization in float32 agrees with integers up to rounding ties: a sum of float products that
lies within float error of half a step may fall on either side. Here sums are exact integers, and the
float arithmetic that turns them into codes is the runtime's own, operation by operation, so that the
results are its results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from zsq.export.operators import accumulator_step, integer_bias
from zsq.export.rewrites import input_quantizer, is_global_pool
from zsq.functional.affine import per_channel
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.student import Student
from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import operator_name, resolve_operator

#: Whole numbers up to this are exact in float32, and so are sums that stay below it.
_EXACT = 2**24


class IntegerSimulation(nn.Module):
    """Runs an integer student as ONNX Runtime runs the file that was exported from it.

    Layers, additions, products and global average pools between quantizers are computed in integers;
    everything else as the student computes it.

    Args:
        student: from `zsq.export.deploy.to_integer`.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``x``, (N, C, H, W) -> (N, classes)."""
        return _Runner(self.student.network).run(x)  # type: ignore[no-any-return]


class _Runner(Interpreter):
    """Computes the values of producers right on the grid of the quantizer that reads them."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.network = network

    def run_node(self, n: Node) -> Any:
        operands = tensor_inputs(n)
        grids = [input_quantizer(self.network, n, i) for i in range(len(operands))]
        known = [grid for grid in grids if grid is not None]
        kernel = self._kernel(n, known)
        if kernel is None or len(known) < len(grids):
            return super().run_node(n)
        codes = [offset_codes(self.env[x], grid) for x, grid in zip(operands, known, strict=True)]
        return kernel(codes)

    def _kernel(
        self, node: Node, grids: list[ActivationQuantizer]
    ) -> Callable[[list[Tensor]], Tensor] | None:
        """Return what computes a node from its operands' codes, or None if floats compute it."""
        layer, output = module_of(self.network, node), self._reader(node)
        if isinstance(layer, QuantizedLayer):
            return lambda codes: run_layer(layer, codes[0], grids[0], output)
        if output is None:
            return None
        name = operator_name(node.target)
        if is_global_pool(node):
            return lambda codes: run_global_pool(codes[0], grids[0], output)
        if name == "aten.add.Tensor" and len(grids) == 2 and node.kwargs.get("alpha", 1) == 1:
            return lambda codes: run_addition(codes, grids, output)
        if name == "aten.mul.Tensor" and len(grids) == 2:
            return lambda codes: run_product(codes, grids, output)
        return None

    def _reader(self, node: Node) -> ActivationQuantizer | None:
        """Return the quantizer that alone reads a node."""
        readers = list(node.users)
        module = module_of(self.network, readers[0]) if len(readers) == 1 else None
        return module if isinstance(module, ActivationQuantizer) else None


def offset_codes(values: Tensor, grid: ActivationQuantizer) -> Tensor:
    """Return values that lie on ``grid`` as whole numbers, zero at zero."""
    return torch.round(values / grid.scale)


def run_layer(
    layer: QuantizedLayer,
    codes: Tensor,
    grid: ActivationQuantizer,
    output: ActivationQuantizer | None,
) -> Tensor:
    """Compute a layer: integer sum, integer bias, one multiplication.

    The multiplier is ``s_x * s_w[c] / s_y`` in front of a quantizer and ``s_x * s_w[c]`` elsewhere,
    rounded to float32 after each operation.
    """
    step = accumulator_step(grid.scale, layer.frozen.scale)
    linear = layer.operator == "aten.linear.default"
    if linear and codes.ndim != 2:  # a matrix product, and the addition of a float bias
        values = accumulate(layer, codes, None).float() * step
        return values if layer.bias is None else values + layer.bias
    bias = None if layer.bias is None else integer_bias(layer.bias, grid.scale, layer.frozen.scale)
    total = accumulate(layer, codes, bias).float()
    shape = [-1] if linear else [-1, *[1] * (total.ndim - 2)]
    if output is None:
        return total * step.reshape(shape)
    return _requantized(total * (step / output.scale).reshape(shape), output)


def accumulate(layer: QuantizedLayer, codes: Tensor, bias: Tensor | None) -> Tensor:
    """Return the exact integer results of a layer, as float32 or float64.

    Float32 arithmetic does it, several times faster, as long as nothing can exceed 2**24. Larger
    weights are split into two halves of 4 bits first.

    Args:
        layer: its weight is taken as codes less zero points.
        codes: whole numbers, (N, C_in, ...).
        bias: (C_out,) int32 or None.
    """
    frozen, call = layer.frozen, resolve_operator(layer.operator)
    weight = frozen.integers.float() - per_channel(frozen.zero_point, frozen.integers)
    upper = torch.floor(weight / 16)
    lower = weight - 16 * upper
    largest = float(codes.abs().max()) if codes.numel() else 0.0
    offset = 0.0 if bias is None else float(bias.double().abs().max())
    if _bound(weight) * largest + offset < _EXACT:
        return call(codes, weight, None if bias is None else bias.float(), *layer.arguments)  # type: ignore[no-any-return]
    wide_bias = None if bias is None else bias.double()
    if max(_bound(upper), _bound(lower)) * largest >= _EXACT:
        return call(codes.double(), weight.double(), wide_bias, *layer.arguments)  # type: ignore[no-any-return]
    total: Tensor = call(codes, upper, None, *layer.arguments).double().mul_(16)
    total += call(codes, lower, None, *layer.arguments)
    axis = -1 if layer.operator == "aten.linear.default" else 1
    return total if wide_bias is None else total.add_(wide_bias.reshape(_column(total, axis)))


def _column(like: Tensor, axis: int) -> list[int]:
    """Shape that broadcasts a vector along one axis."""
    return [-1 if i == axis % like.ndim else 1 for i in range(like.ndim)]


def _bound(weight: Tensor) -> float:
    """Largest sum of absolute weights of a channel."""
    return float(weight.abs().flatten(1).sum(1).max())


def run_addition(
    codes: list[Tensor], grids: list[ActivationQuantizer], output: ActivationQuantizer
) -> Tensor:
    """Add as ``QLinearAdd`` does: two fused multiply-adds on a constant that holds the zero points."""
    (a, b), (grid_a, grid_b) = codes, grids
    ratio_a, ratio_b = grid_a.scale / output.scale, grid_b.scale / output.scale
    fixed = output.zero_point - (ratio_a * grid_a.zero_point + ratio_b * grid_b.zero_point)
    inner = _fused(b + grid_b.zero_point, ratio_b, fixed)
    return _on_grid(_fused(a + grid_a.zero_point, ratio_a, inner), output)


def _fused(x: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    """Multiply and add with one rounding, to float32."""
    return (x.double() * factor.double() + constant.double()).float()


def run_product(
    codes: list[Tensor], grids: list[ActivationQuantizer], output: ActivationQuantizer
) -> Tensor:
    """Multiply as ``QLinearMul`` does: one multiplier, then the zero point, in float32."""
    ratio = grids[0].scale * grids[1].scale / output.scale
    return _on_grid(codes[0] * codes[1] * ratio + output.zero_point, output)


def run_global_pool(
    codes: Tensor, grid: ActivationQuantizer, output: ActivationQuantizer
) -> Tensor:
    """Average as ``QLinearGlobalAveragePool`` does: integer sum, one multiplication."""
    total = codes.double().sum((2, 3), keepdim=True).float()
    count = float(codes.shape[2] * codes.shape[3])
    return _requantized(total * (grid.scale / (output.scale * count)), output)


def _requantized(steps: Tensor, output: ActivationQuantizer) -> Tensor:
    """Round steps of ``output``, to which the zero point is yet to be added."""
    zero = output.zero_point
    return torch.round(steps).clamp_(output.low - zero, output.high - zero) * output.scale


def _on_grid(steps: Tensor, output: ActivationQuantizer) -> Tensor:
    """Round steps of ``output`` that include its zero point already."""
    codes = torch.round(steps).clamp_(output.low, output.high)
    return (codes - output.zero_point) * output.scale
