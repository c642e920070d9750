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
    count = x.numel() // x.shape[1]
    mean, variance = centered_moments(x, center)
    unbiased = variance.clamp(min=SMALLEST_VARIANCE) * (count / max(count - 1, 1))
    return mean, torch.sqrt(unbiased)


def centered_moments(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return per-channel mean and biased variance, as `mean_std` computes them."""
    count = x.numel() // x.shape[1]
    centered = x.float() - center.reshape(1, -1, *[1] * (x.ndim - 2))
    flat = centered.flatten(2) if x.ndim > 2 else centered.unsqueeze(-1)
    first = flat.sum(2).sum(0) / count
    second = (flat * flat).sum(2).sum(0) / count
    return first + center, second - first * first


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
    total = torch.zeros((), device=inputs[0].device)
    for x, mean, std in zip(inputs, means, stds, strict=True):
        batch_mean, batch_std = mean_std(x, mean)
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
    std = torch.sqrt(variance * (count / (count - 1)))
    return (mean**2 + (std - 1.0) ** 2).sum(1).mean()
