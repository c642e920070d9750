# SPDX-License-Identifier: Apache-2.0
"""Weight quantizers: what stands in for a layer's weight while it is tuned, and after.

Every weight quantizer is a module whose ``forward()`` returns the weight to compute with, and whose
``codes()`` returns the integers that will be shipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zsq.functional.affine import (
    SMALLEST_SCALE,
    Grid,
    dequantize,
    per_channel,
    quant_max,
    quantize,
    search_weight_grid,
)  # fmt: skip
from zsq.functional.rounding import inverse_rectified_sigmoid, rectified_sigmoid


class FrozenWeight(nn.Module):
    """Integer codes with a scale and a zero point per output channel: what is saved and shipped.

    Args:
        codes: (C, ...) uint8.
        scale: (C,) float32.
        zero_point: (C,) whole numbers inside the code range.
        bits: 2 to 8.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("integers", codes.to(torch.uint8))
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("zero_point", zero_point.detach().clone().float())

    def forward(self) -> Tensor:
        """Return the dequantized weight."""
        return dequantize(self.integers, self.scale, self.zero_point)

    def codes(self) -> Tensor:
        """Return the integer codes."""
        return self.integers

    def extra_repr(self) -> str:
        """Describe the quantizer in one line."""
        return f"bits={self.bits}, shape={tuple(self.integers.shape)}"


class SoftRoundWeight(nn.Module):
    """Learned rounding with a learned step: AdaRound's soft bits and GENIE-M's joint step.

    The base integer ``floor(w / scale)`` is computed once, from the first step, and is a constant
    from then on; step and soft bits are independent (GENIE, arXiv 2212.04780, section 4.2):
    ``weight = scale * (clip(base + h(v) + zero_point, 0, 2**bits - 1) - zero_point)``.

    Args:
        weight: (C, ...) float weight to quantize.
        bits: 2 to 8.
        grid: scale and zero point per channel; searched when None.
        log_scale: learn the step's logarithm (its relative speed is then the same in every layer,
            and it cannot change sign) or the step itself, as published.
    """

    base: Tensor
    free: Tensor
    zero_point: Tensor

    def __init__(
        self, weight: Tensor, bits: int, grid: Grid | None = None, *, log_scale: bool = True
    ) -> None:
        super().__init__()
        grid = search_weight_grid(weight, bits) if grid is None else grid
        self.bits = bits
        self.log_scale = log_scale
        ratio = weight.detach() / per_channel(grid.scale, weight)
        base = torch.floor(ratio)
        low = -per_channel(grid.zero_point, base)
        high = low + quant_max(bits)
        # clip(base + h, low, high) for every h in [0, 1], without clipping in every step
        self.register_buffer("base", base.clamp(low, high))
        self.register_buffer("free", ((base >= low) & (base < high)).to(base.dtype))
        self.register_buffer("zero_point", grid.zero_point.clone())
        self.rounding = nn.Parameter(inverse_rectified_sigmoid(ratio - base))
        self.raw_scale = nn.Parameter(grid.scale.log() if log_scale else grid.scale.clone())
        self.used_bits = self.soft_bits().detach()

    def __getstate__(self) -> dict[str, Any]:
        """What copies take over: everything, but not the last pass's graph."""
        return {**self.__dict__, "used_bits": self.used_bits.detach()}

    @property
    def scale(self) -> Tensor:
        """Step per output channel, (C,), positive."""
        if self.log_scale:
            return self.raw_scale.exp()
        return self.raw_scale.abs().clamp(min=SMALLEST_SCALE)

    def soft_bits(self) -> Tensor:
        """Return h(v), in [0, 1], of the weight's shape."""
        return rectified_sigmoid(self.rounding)

    def forward(self) -> Tensor:
        """Return the softly rounded weight; its soft bits stay in `used_bits` for a regulariser."""
        self.used_bits = self.soft_bits()
        return torch.addcmul(self.base, self.free, self.used_bits) * per_channel(
            self.scale, self.base
        )

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes after rounding every soft bit to 0 or 1."""
        hard = self.base + self.free * (self.rounding >= 0)
        return (hard + per_channel(self.zero_point, hard)).to(torch.uint8)

    @torch.no_grad()
    def undecided(self) -> float:
        """Return the share of soft bits outside [0, 0.05] and [0.95, 1]."""
        h = self.soft_bits()
        return float(((h > 0.05) & (h < 0.95)).float().mean())

    def freeze(self) -> FrozenWeight:
        """Return the hard-rounded, constant quantizer."""
        return FrozenWeight(self.codes(), self.scale, self.zero_point, self.bits)


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, grid: Grid | None = None) -> FrozenWeight:
    """Quantize ``weight`` by rounding to the nearest code of its (searched) grid."""
    grid = search_weight_grid(weight, bits) if grid is None else grid
    codes = quantize(weight, grid.scale, grid.zero_point, quant_max(bits))
    return FrozenWeight(codes, grid.scale, grid.zero_point, bits)
