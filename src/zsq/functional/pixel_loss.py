# SPDX-License-Identifier: Apache-2.0
"""What pixels are optimised for: terms of ZeroQ, IntraQ and HAST.

Several batches can be in flight side by side. Statistics are those of a batch, so every function
takes their number, ``groups``, and returns one loss per batch, (groups,); images of a batch lie
next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Added to variances before the root, as published (ZeroQ).
VARIANCE_EPS = 1e-6
#: Smallest difficulty 1 - p: at p = 1 a power below one would have an infinite gradient.
SMALLEST_DIFFICULTY = 1e-6


def per_group(values: Tensor, groups: int) -> Tensor:
    """Average values of single images over each batch, (groups * N,) -> (groups,)."""
    return values.reshape(groups, -1).mean(1)


def grouped_moments(x: Tensor, center: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per batch and channel, each (groups, C), in float32.

    Args:
        x: (groups * N, C, ...).
        center: (C,), near the mean, so that one pass over ``x`` is exact enough.
        groups: batches side by side.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [5.0], [5.0]])
        >>> grouped_moments(x, torch.tensor([2.0]), 2)
        (tensor([[2.],
                [5.]]), tensor([[1.],
                [0.]]))
    """
    flat = _centered(x, center)
    count = flat.shape[2] * flat.shape[0] // groups
    first = flat.sum(2).reshape(groups, -1, x.shape[1]).sum(1) / count
    second = (flat * flat).sum(2).reshape(groups, -1, x.shape[1]).sum(1) / count
    return first + center, second - first * first


def _centered(x: Tensor, center: Tensor) -> Tensor:
    flat = x.float().flatten(2) if x.ndim > 2 else x.float().unsqueeze(-1)
    return flat - center.reshape(1, -1, 1)


def batch_statistics_distance(
    inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor], groups: int
) -> Tensor:
    """Distance of batch mean and biased variance from the stored ones (IntraQ, HAST), (groups,).

    Squared differences averaged over channels, then over layers; the same as
    `zsq.functional.generator_loss.variance_distance` of each batch.

    Args:
        inputs: batch norm inputs, each (groups * N, C_l, ...).
        means: stored means, each (C_l,).
        variances: stored variances, each (C_l,).
        groups: batches side by side.
    """
    total = torch.zeros(groups, device=inputs[0].device)
    for x, mean, variance in zip(inputs, means, variances, strict=True):
        batch_mean, batch_variance = grouped_moments(x, mean, groups)
        distance = (batch_mean - mean) ** 2 + (batch_variance - variance) ** 2
        total = total + distance.mean(1)
    return total / len(inputs)


def image_statistics_distance(
    images: Tensor, inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor],
    groups: int,
) -> Tensor:  # fmt: skip
    """Distance of every *image's* mean and standard deviation from the stored ones (ZeroQ), (groups,).

    Summed over layers and channels, averaged over images; unbiased variances, 1e-6 inside the root.
    The image itself counts as a layer, with mean 0 and standard deviation 1. Where an image has one value per
    channel (behind pooling, in networks of vectors) that value alone says nothing of a spread, and asking every
    image for the mean would make all alike: there the values of a batch count as those of one image.

    Args:
        images: (groups * N, C, H, W), normalised.
        inputs: batch norm inputs, each (groups * N, C_l, ...).
        means: stored means, each (C_l,).
        variances: stored variances, each (C_l,).
        groups: batches side by side.
    """
    zero = torch.zeros(images.shape[1], device=images.device)
    total = torch.zeros(len(images), device=images.device)
    of_batches = torch.zeros(groups, device=images.device)
    for x, mean, variance in zip(
        (images, *inputs), (zero, *means), (zero + 1.0 - VARIANCE_EPS, *variances), strict=True
    ):
        values = _centered(x, mean)
        if values.shape[2] == 1:
            batches = values.reshape(groups, -1, len(mean)).transpose(1, 2)
            of_batches = of_batches + _spread_distance(batches, variance)
        else:
            total = total + _spread_distance(values, variance)
    return per_group(total, groups) + of_batches


def _spread_distance(flat: Tensor, variance: Tensor) -> Tensor:
    """Distance of mean and deviation of the values (N, C, count), less the stored mean, from 0 and the stored one."""
    count = flat.shape[2]
    offset = flat.mean(2)
    biased = ((flat * flat).mean(2) - offset * offset).clamp(min=0)
    std = torch.sqrt(biased * (count / max(count - 1, 1)) + VARIANCE_EPS)
    return (offset**2 + (std - torch.sqrt(variance + VARIANCE_EPS)) ** 2).sum(1)


def difficulty_cross_entropy(
    logits: Tensor, labels: Tensor, gamma: float, groups: int = 1
) -> Tensor:
    """Cross-entropy weighted by how hard an image is, ``(1 - p)**gamma * CE`` (HAST), (groups,).

    Computed from log-probabilities: safe where the teacher is certain, p = 1. The gradient flows
    through the weight too, as published.

    Args:
        logits: (groups * N, C).
        labels: (groups * N,) int64.
        gamma: 0 is the plain cross-entropy.
        groups: batches side by side.

    Example:
        >>> difficulty_cross_entropy(torch.tensor([[99.0, 0.0]]), torch.tensor([0]), 0.5)
        tensor([0.])
    """
    log_p = logits.float().log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    difficulty = (-torch.expm1(log_p)).clamp(min=SMALLEST_DIFFICULTY)
    return per_group(-(difficulty**gamma) * log_p, groups)


def soft_target_error(logits: Tensor, labels: Tensor, wanted: Tensor, groups: int = 1) -> Tensor:
    """Squared gap between the label's probability and a wanted one (soft inception, IntraQ), (groups,).

    Args:
        logits: (groups * N, C).
        labels: (groups * N,) int64.
        wanted: (groups * N,) probabilities.
        groups: batches side by side.
    """
    p = logits.float().softmax(1).gather(1, labels[:, None]).squeeze(1)
    return per_group((p - wanted) ** 2, groups)


def class_band(
    features: Tensor, centers: Tensor, known: Tensor, band: tuple[float, float], groups: int = 1
) -> Tensor:
    """Keep the cosine distance to the class centre within a band (IntraQ, section 3.2), (groups,).

    Args:
        features: (groups * N, F), pooled.
        centers: (groups * N, F), each image's class centre.
        known: (groups * N,) bool; images whose class has no centre yet do not count.
        band: smallest and largest distance, within [0, 2].
        groups: batches side by side.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> class_band(x, x, torch.tensor([True]), (0.05, 0.8))
        tensor([0.0500])
    """
    distance = 1.0 - torch.cosine_similarity(features.float(), centers, dim=1)
    low, high = band
    outside = (low - distance).clamp(min=0) + (distance - high).clamp(min=0)
    counted = known.float().reshape(groups, -1)
    return (outside.reshape(groups, -1) * counted).sum(1) / counted.sum(1).clamp(min=1)
