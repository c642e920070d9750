# SPDX-License-Identifier: Apache-2.0
"""Batch statistics in float32 and the loss that matches them to the stored ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Below this a variance is rounding noise; the root's gradient is cut off there.
SMALLEST_VARIANCE = 1e-12


def mean_std(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return per-channel mean and unbiased standard deviation, in float32 whatever ``x`` is.

    Sums of ``x - center`` and of its square: one pass over memory, and exact enough when ``center``
    is near the mean, as a stored mean is. Summed per image first, so that images are the parallel
    axis however few channels there are.

    Args:
        x: (N, C, ...).
        center: (C,).

    Returns:
        Mean and standard deviation, each (C,).

    Example:
        >>> mean, std = mean_std(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0]))
        >>> mean.item(), round(std.item(), 4)
        (2.0, 1.4142)
    """
    return _mean_std(*centered_sums(x, center), x.numel() // x.shape[1], center)


def _mean_std(first: Tensor, second: Tensor, count: int, center: Tensor) -> tuple[Tensor, Tensor]:
    first, second = first / count, second / count
    variance = (second - first * first).clamp(min=SMALLEST_VARIANCE)
    unbiased = variance * (count / (count - 1) if count > 1 else 1)
    return first + center, torch.sqrt(unbiased)


def centered_moments(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return per-channel mean and biased variance, as `mean_std` computes them."""
    count = x.numel() // x.shape[1]
    first, second = (total / count for total in centered_sums(x, center))
    return first + center, second - first * first


def centered_sums(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return per-channel sums of ``x - center`` and of its square, each (C,) float32.

    Sums of parts of a batch add up to the batch's.
    """
    centered = x.float() - center.reshape(1, -1, *[1] * (x.ndim - 2))
    flat = centered.flatten(2) if x.ndim > 2 else centered.unsqueeze(-1)
    return flat.sum(2).sum(0), (flat * flat).sum(2).sum(0)


def batch_norm_loss(
    inputs: Sequence[Tensor], means: Sequence[Tensor], stds: Sequence[Tensor]
) -> Tensor:
    """Distance between batch statistics and stored ones (GENIE, arXiv 2212.04780, section 4.1).

    Per layer the squared differences of mean and standard deviation, averaged over channels; summed
    over layers.

    Args:
        inputs: batch norm inputs, each (N, C_l, ...).
        means: stored means, each (C_l,).
        stds: stored standard deviations, each (C_l,).

    Returns:
        A scalar.
    """
    found = [mean_std(x, mean) for x, mean in zip(inputs, means, strict=True)]
    return _distance(found, means, stds)


def batch_norm_loss_of_sums(
    sums: Sequence[Tensor], counts: Sequence[int], means: Sequence[Tensor], stds: Sequence[Tensor]
) -> Tensor:
    """Return `batch_norm_loss` from the sums of `centered_sums` about the stored means.

    Args:
        sums: per layer (2, C_l).
        counts: per layer, elements summed per channel.
        means: stored means, each (C_l,).
        stds: stored standard deviations, each (C_l,).
    """
    found = [_mean_std(s[0], s[1], n, m) for s, n, m in zip(sums, counts, means, strict=True)]
    return _distance(found, means, stds)


def _distance(
    found: Sequence[tuple[Tensor, Tensor]], means: Sequence[Tensor], stds: Sequence[Tensor]
) -> Tensor:
    total = torch.zeros((), device=means[0].device)
    for (batch_mean, batch_std), mean, std in zip(found, means, stds, strict=True):
        total = total + ((batch_mean - mean) ** 2 + (batch_std - std) ** 2).mean()
    return total


def image_loss(images: Tensor) -> Tensor:
    """Distance of each image's channel statistics from mean 0 and standard deviation 1.

    Args:
        images: (N, C, H, W), normalised.

    Returns:
        A scalar: summed over channels, averaged over images.
    """
    flat = images.float().flatten(2)
    count = flat.shape[2]
    mean = flat.mean(2)
    variance = ((flat * flat).mean(2) - mean * mean).clamp(min=SMALLEST_VARIANCE)
    std = torch.sqrt(variance * (count / (count - 1) if count > 1 else 1))
    return (mean**2 + (std - 1.0) ** 2).sum(1).mean()
