# SPDX-License-Identifier: Apache-2.0
"""The activation quantizer: one learned step for a whole tensor, on one edge of the graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from zsq.errors import RunError
from zsq.functional.affine import SMALLEST_SCALE, Grid, fake_quantize, quant_max
from zsq.functional.masks import RandomMasks


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantization with a learned step (LSQ, arXiv 1902.08153) and QDrop.

    Args:
        bits: 2 to 8.
        log_scale: learn the step's logarithm, or the step itself.

    Attributes:
        drop: probability that an element passes through unquantized (QDrop, arXiv 2203.05740);
            0 except while a unit is being reconstructed.
        mask: which elements pass, where `draw_mask` decided it; None lets each pass draw.
        enabled: False turns the quantizer into the identity.
        low, high: the codes that may occur, 0 and 2**bits - 1 unless an activation function that
            was folded in here (ReLU, ReLU6) narrows them.
    """

    zero_point: Tensor
    calibrated: Tensor
    mask: Tensor | None

    def __init__(self, bits: int, *, log_scale: bool = True) -> None:
        super().__init__()
        self.bits = bits
        self.low, self.high = 0, quant_max(bits)
        self.log_scale = log_scale
        self.masks = RandomMasks(0.0)
        self.enabled = True
        self.raw_scale = nn.Parameter(torch.zeros(()) if log_scale else torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("mask", None, persistent=False)

    @property
    def drop(self) -> float:
        """Probability that an element passes through unquantized."""
        return self.masks.probability

    @drop.setter
    def drop(self, probability: float) -> None:
        self.masks, self.mask = RandomMasks(probability), None

    def draw_mask(self, x: Tensor) -> None:
        """Draw what the next passes leave unquantized, for inputs with the layout of ``x``.

        Without it every pass draws for itself, which a compiler cannot take.
        """
        self.mask = self.masks.draw(x) if self.drop > 0 else None

    @property
    def scale(self) -> Tensor:
        """The step, a positive scalar."""
        if self.log_scale:
            return self.raw_scale.exp()
        return self.raw_scale.abs().clamp(min=SMALLEST_SCALE)

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Take over a scale and a zero point (scalars)."""
        scale = grid.scale.clamp(min=SMALLEST_SCALE)
        if not bool(torch.isfinite(scale)):
            raise RunError(
                f"an activation range is {float(scale)}; the images or weights hold NaN or Inf."
            )
        self.raw_scale.copy_(scale.log() if self.log_scale else scale)
        self.zero_point.copy_(grid.zero_point)
        self.calibrated.fill_(True)

    @torch.no_grad()
    def grid(self) -> Grid:
        """Return a copy of the scale and the zero point (scalars); of no search, so without an error."""
        return Grid(
            self.scale.clone(), self.zero_point.clone(), torch.full_like(self.scale, torch.nan)
        )

    @torch.no_grad()
    def stretch(self, factor: float) -> None:
        """Make the range, and so the step, wider by a factor; the zero point stays."""
        grid = self.grid()
        self.set_grid(replace(grid, scale=grid.scale * factor))

    @torch.no_grad()
    def settle(self) -> None:
        """Make the step a constant, as it will be saved, and always quantize."""
        self.raw_scale.copy_(self.scale)
        self.log_scale = False
        self.drop = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the quantizer's grid."""
        if not self.enabled:
            return x
        if x.dtype == torch.bfloat16:
            x = x.float()  # a code of 8 bits is as fine as bf16's mantissa
        keep = self.mask
        if keep is None and self.drop > 0:
            keep = self.masks.draw(x)
        return fake_quantize(x, self.scale, self.zero_point, self.high, self.low, keep)

    def extra_repr(self) -> str:
        """Describe the quantizer in one line."""
        return f"bits={self.bits}, codes {self.low}..{self.high}"
