# SPDX-License-Identifier: Apache-2.0
"""When a weight's integer code changes as the weight moves along a line, in closed form.

A weight ``w`` that moves to ``w - a * d`` keeps its code until it reaches the nearest rounding
threshold in its direction. On a grid that stands still that happens at one multiplier ``a`` per
weight, so the multiplier at which a given share of a tensor's codes has changed is an order
statistic of those: no search, and nothing read from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsq.functional.affine import per_channel, quant_max

#: How far beyond its threshold a weight is taken, as a share of the code range, so that rounding in
#: float32 agrees: its resolution at the range's end.
MARGIN = torch.finfo(torch.float32).eps


def crossing_multipliers(
    weight: Tensor, direction: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Return the multiplier ``a`` at which each code of ``weight - a * direction`` changes first.

    Infinite where the direction is zero or not finite, and where the code is the outermost already
    and the weight moves outwards.

    Args:
        weight: (C, ...) float32.
        direction: like ``weight``.
        scale: (C,).
        zero_point: (C,).
        bits: 2 to 8.

    Example:
        >>> w, d = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[-1.0, 0.25, -1.0]])
        >>> crossing_multipliers(w, d, torch.tensor([1.0]), torch.tensor([0.0]), 2)
        tensor([[0.5000, 2.0000,    inf]])
    """
    step, zero = per_channel(scale, weight), per_channel(zero_point, weight)
    high = quant_max(bits)
    position = weight / step
    speed = -direction / step
    code = (torch.round(position) + zero).clamp(0, high)
    sign = torch.sign(speed)
    threshold = code - zero + sign * (0.5 + MARGIN * 2**bits)
    stuck = (sign > 0) & (code >= high) | (sign < 0) & (code <= 0)
    multiplier = (threshold - position) / speed
    blocked = stuck | (speed == 0) | ~torch.isfinite(speed)
    return torch.where(blocked, torch.inf, multiplier)


def multiplier_for_share(multipliers: Tensor, target: float, cap: float) -> Tensor:
    """Return, for each row, the smallest multiplier >= 1 at which a share of the row has crossed.

    Args:
        multipliers: (L, n), from `crossing_multipliers`.
        target: share of a row; at least one element where it is positive.
        cap: largest multiplier. Where the share is out of reach below it, the multiplier at which
            the last reachable element crosses is taken; 1 where there is none.

    Returns:
        (L,) in [1, cap].

    Example:
        >>> multiplier_for_share(torch.tensor([[4.0, 2.0, torch.inf, 8.0]]), 0.5, 100.0)
        tensor([4.])
    """
    count = multipliers.shape[1]
    wanted = min(max(math.ceil(target * count), 1), count)
    smallest = torch.topk(multipliers, wanted, dim=1, largest=False, sorted=False).values
    last = smallest.amax(1)
    reachable = torch.where(smallest <= cap, smallest, -torch.inf).amax(1)
    return torch.where(last <= cap, last, reachable).clamp(min=1.0)
