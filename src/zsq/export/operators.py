# SPDX-License-Identifier: Apache-2.0
"""The operators of a deployed network: how quantization is said to ``torch.onnx.export``.

Arithmetic written with ``round`` and ``clamp`` would be exported as arithmetic. The opaque
operators keep its meaning, and each has a translation into standard ONNX operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset21 as op
from torch import Tensor, nn

from zsq.functional.affine import dequantize, per_channel, quantize
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.teacher.layers import resolve_operator

#: What `torch.onnx.export` is told to write for an operator.
Translations = dict[Callable[..., Any], Callable[..., Any]]


@torch.library.custom_op("zsq::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, clip: bool
) -> Tensor:
    """Quantize and dequantize an activation; ``scale`` and ``zero_point`` are scalars.

    ``clip`` asks for an integer Clip even where all 256 codes may occur.
    """
    zero = zero_point.to(scale.dtype)
    return dequantize(quantize(x, scale, zero, high, low), scale, zero)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, clip: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("zsq::dequantize_parameter", mutates_args=())
def dequantize_parameter(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Dequantize an integer weight or bias with one scale per index of ``axis``."""
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype).reshape(shape)) * scale.reshape(
        shape
    )


@dequantize_parameter.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("zsq::global_average_pool", mutates_args=())
def global_average_pool(x: Tensor) -> Tensor:
    """Average each channel: (N, C, H, W) -> (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


@global_average_pool.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 1, 1)


def _uint8(value: int) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, np.uint8)))


def _translate_fake_quantize(x, scale, zero_point, low: int, high: int, clip: bool):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    codes = op.QuantizeLinear(x, scale, zero_point)
    if clip or (low, high) != (0, 255):
        codes = op.Clip(codes, _uint8(low), _uint8(high))
    return op.DequantizeLinear(codes, scale, zero_point)


def _translate_parameter(codes, scale, zero_point, axis: int):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def _translate_pool(x):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return op.GlobalAveragePool(x)


def _translate_softmax(x, dim: int, _dtype: int = -1):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Write a softmax by its parts.

    Between quantizers ONNX Runtime computes a whole one from a table, by a rule of its own that differs from
    rounding the float result by a code in a tenth of all elements. Its parts stay float32, as everything
    here, whatever type is asked for.
    """
    axis: Any = op.Constant(value_ints=[dim])
    powers = op.Exp(op.Sub(x, op.ReduceMax(x, axis)))
    return op.Div(powers, op.ReduceSum(powers, axis))


def translations() -> Translations:
    """Return how an integer network's operators are said in ONNX, for ``torch.onnx.export``."""
    return {
        torch.ops.aten.softmax.int: _translate_softmax,
        torch.ops.aten._softmax.default: _translate_softmax,
        torch.ops.zsq.fake_quantize.default: _translate_fake_quantize,
        torch.ops.zsq.dequantize_parameter.default: _translate_parameter,
        torch.ops.zsq.global_average_pool.default: _translate_pool,
    }


class DeployedQuantizer(nn.Module):
    """An activation quantizer as it is exported: constants and one operator.

    Args:
        quantizer: settled.
        clip: write an integer Clip even where all 256 codes may occur.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer, *, clip: bool) -> None:
        super().__init__()
        self.low, self.high, self.clip = quantizer.low, quantizer.high, clip
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        return torch.ops.zsq.fake_quantize(  # type: ignore[no-any-return]
            x, self.scale, self.zero_point, self.low, self.high, self.clip
        )

    def key(self) -> tuple[float, int, int, int]:
        """Return what tells this grid from others."""
        return float(self.scale), int(self.zero_point), self.low, self.high


class DeployedLayer(nn.Module):
    """A layer as it is exported: integer weight, 32-bit integer bias, and their scales.

    Args:
        layer: frozen, its bias on the accumulator's grid.
        input_scale: step of its input; None where that is float, which leaves the bias float.
        matrix: whether its input has two axes. A linear layer on more axes becomes a matrix product
            with the transposed weight, the only form that runtimes fuse.
    """

    weight_quantized: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    bias_quantized: Tensor | None
    bias_scale: Tensor
    bias_zero_point: Tensor

    def __init__(self, layer: QuantizedLayer, input_scale: Tensor | None, *, matrix: bool) -> None:
        super().__init__()
        frozen, offset = layer.frozen, weight_offset(layer)
        self.arguments = layer.arguments
        self.transposed = layer.operator == "aten.linear.default" and not matrix
        codes = frozen.integers.to(torch.int16) - per_channel(offset, frozen.integers)
        codes = codes.to(torch.int8)
        self.register_buffer(
            "weight_quantized", codes.t().contiguous() if self.transposed else codes
        )
        self.register_buffer("weight_scale", frozen.scale.clone())
        self.register_buffer("weight_zero_point", (frozen.zero_point - offset).to(torch.int8))
        self._call = resolve_operator(layer.operator)
        self.register_buffer("bias", None)
        self.register_buffer("bias_quantized", None)
        if layer.bias is not None and (input_scale is None or self.transposed):
            self.bias = layer.bias.clone()
        elif layer.bias is not None and input_scale is not None:
            step = accumulator_step(input_scale, frozen.scale)
            self.register_buffer(
                "bias_quantized", integer_bias(layer.bias, input_scale, frozen.scale)
            )
            self.register_buffer("bias_scale", step)
            self.register_buffer("bias_zero_point", torch.zeros(len(step), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        dequantize_ = torch.ops.zsq.dequantize_parameter
        axis = 1 if self.transposed else 0
        weight = dequantize_(self.weight_quantized, self.weight_scale, self.weight_zero_point, axis)
        bias = self.bias
        if self.bias_quantized is not None:
            bias = dequantize_(self.bias_quantized, self.bias_scale, self.bias_zero_point, 0)
        if self.transposed:
            product = torch.matmul(x, weight)
            return product if bias is None else product + bias
        return self._call(x, weight, bias, *self.arguments)  # type: ignore[no-any-return]

    def parameter_keys(self) -> list[tuple[bytes, ...]]:
        """Return, for the weight and an integer bias, what tells them from those of other layers."""
        stored = [(self.weight_quantized, self.weight_scale, self.weight_zero_point)]
        if self.bias_quantized is not None:
            stored.append((self.bias_quantized, self.bias_scale, self.bias_zero_point))
        return [tuple(tensor.numpy().tobytes() for tensor in tensors) for tensors in stored]


def weight_offset(layer: QuantizedLayer) -> Tensor:
    """Return what is taken off a layer's codes and zero points to store them as int8, (C,) int16.

    Half the range, which keeps 4 bits 4 bits wide; the zero points themselves where channels with
    different ones would send ONNX Runtime down a slow path, ten times and more: depthwise layers.
    """
    zero = layer.frozen.zero_point.to(torch.int16)
    return (
        zero if stored_without_zero_point(layer) else torch.full_like(zero, 2 ** (layer.bits - 1))
    )


def stored_bits(bits: int, *, depthwise: bool) -> int:
    """Return how wide an ONNX file stores a weight: INT4 up to 4 bits, INT8 above and if depthwise."""
    return 4 if bits <= 4 and not depthwise else 8


def stored_without_zero_point(layer: QuantizedLayer) -> bool:
    """Whether a layer's weights are stored as int8 with zero points of 0; 8 bits are too wide for it."""
    return layer.is_depthwise and layer.bits < 8


def accumulator_step(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return what one unit of a layer's accumulator stands for, (C,) float32 as runtimes compute it."""
    return input_scale.detach().float() * weight_scale.detach().float()


def integer_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return a snapped bias in units of the accumulator, (C,) int32."""
    step = accumulator_step(input_scale, weight_scale).double()
    return torch.round(bias.double() / step).to(torch.int32)
