# SPDX-License-Identifier: Apache-2.0
"""Random resized crops of a whole batch at once: two products with interpolation matrices.

Every image has a window; its rows and columns are resampled bilinearly to the full size. As matrix
products this has a deterministic gradient on every device, and no loop over images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Range of aspect ratios (width over height), as is usual for random resized crops.
ASPECTS = (3 / 4, 4 / 3)
#: Windows that are tried per image; where none fits, the whole image is taken.
TRIES = 10


def random_windows(
    count: int, smallest: float, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw windows of random area, aspect ratio and position, half of them mirrored.

    Args:
        count: number of images.
        smallest: smallest share of the area; the largest is 1.
        probability: of a window per image; otherwise the image stays whole, unmirrored.
        generator: to draw from.

    Returns:
        (count, 5) float32: top, left, height, width as shares of the side, and 1 where mirrored.

    Example:
        >>> random_windows(1, 0.5, 0.0)
        tensor([[0., 0., 1., 1., 0.]])
    """
    area, ratio, top, left = torch.rand(4, count, TRIES, generator=generator)
    low, high = (math.log(aspect) for aspect in ASPECTS)
    area = smallest + (1 - smallest) * area
    ratio = torch.exp(low + (high - low) * ratio)
    width, height = torch.sqrt(area * ratio), torch.sqrt(area / ratio)
    fits = (width <= 1) & (height <= 1)
    candidates = torch.stack([top * (1 - height), left * (1 - width), height, width], -1)
    first = fits.int().argmax(1)
    chosen = candidates[torch.arange(count), first]
    used, mirrored = torch.rand(2, count, generator=generator)
    whole = ~fits.any(1) | (used >= probability)
    chosen[whole] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    flipped = (mirrored < 0.5) & (used < probability)
    return torch.cat([chosen, flipped.float()[:, None]], 1)


def crop(images: Tensor, windows: Tensor) -> Tensor:
    """Resample each image's window to the full size.

    Args:
        images: (N, C, H, W).
        windows: (N, 5), of `random_windows`.

    Returns:
        (N, C, H, W) float32; whole windows return the image itself.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> crop(x, torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]))
        tensor([[[[3., 2., 1., 0.]]]])
    """
    top, left, height, width, mirrored = windows.unbind(1)
    rows = _interpolation(top, height, images.shape[2])
    columns = _interpolation(left, width, images.shape[3])
    columns = torch.where(mirrored[:, None, None] > 0.5, columns.flip(1), columns)
    # (N, 1, H', H) @ (N, C, H, W) @ (N, 1, W, W')
    return rows[:, None] @ images.float() @ columns.mT[:, None]


def _interpolation(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Return matrices (N, side, side) that sample ``side`` points of a window, half pixels as centres."""
    points = torch.arange(side, device=start.device)
    position = (start[:, None] + (points + 0.5) / side * length[:, None]) * side - 0.5
    first, last = start * side, (start + length) * side - 1
    position = torch.minimum(torch.maximum(position, first[:, None]), last[:, None])
    return (1 - (position[:, :, None] - points).abs()).clamp(min=0)
