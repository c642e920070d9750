# SPDX-License-Identifier: Apache-2.0
"""Rules that turn a sample of an activation into a grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zsq.functional.affine import Grid, grid_of_range, quant_max, search_activation_grid

RangeRule = Literal["minmax", "percentile", "error"]


@torch.no_grad()
def range_grid(
    x: Tensor, bits: int, rule: RangeRule = "error", *, power: float = 2.4, asymmetric: bool = True,
    percentile: float = 99.99,
) -> Grid:  # fmt: skip
    """Choose one grid for an activation tensor.

    Minimum and maximum keep everything; at four bits and below clipping the tails is better, by a
    percentile or by the error of rounding itself.

    Args:
        x: any shape; a sample of some 10,000 to 1,000,000 elements.
        bits: 2 to 8.
        rule: ``minmax``; ``percentile``, which leaves out the outermost values at either end;
            ``error``, the range of the least mean of ``|x - x^|**power``.
        power: exponent of that error.
        asymmetric: of the search for that error, see `search_activation_grid`.
        percentile: per cent of the values that are kept at either end.

    Returns:
        Scalar scale and zero point; the range contains zero. ``error`` is only searched by ``error``.

    Example:
        >>> round(range_grid(torch.tensor([0.0, 1.0, 3.0]), 2, "minmax").scale.item(), 4)
        1.0
    """
    if rule == "error":
        return search_activation_grid(x, bits, power=power, asymmetric=asymmetric)
    flat = x.detach().flatten().float()
    share = 1.0 if rule == "minmax" else percentile / 100
    ends = torch.tensor([1 - share, share], device=flat.device)
    low, high = torch.quantile(flat, ends)
    scale, zero_point = grid_of_range(low, high, quant_max(bits), True)
    return Grid(scale, zero_point, torch.full_like(scale, torch.nan))
