# SPDX-License-Identifier: Apache-2.0
"""What a conditional generator learns from: the class asked for, and the batch norms' statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zsq.functional.statistics import centered_moments


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of predictions with target distributions, averaged over images.

    Args:
        logits: (N, C).
        targets: (N, C); rows sum to 1.

    Example:
        >>> round(soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])).item(), 4)
        0.6931
    """
    return -(targets * logits.float().log_softmax(1)).sum(1).mean()


def variance_distance(
    inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor],
    pool: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:  # fmt: skip
    """Distance between batch statistics and stored ones (BNS; GDFQ, arXiv 2003.03603).

    Squared differences of mean and *biased variance*, averaged over channels, then over layers.
    (GENIE's distance, `zsq.functional.statistics.batch_norm_loss`, compares standard deviations and
    sums over layers.)

    Args:
        inputs: batch norm inputs, each (N, C_l, ...).
        means: stored means, each (C_l,).
        variances: stored variances, each (C_l,).
        pool: turns offsets from the stored means and variances of a part of the batch into those of
            the whole; called once with all channels.

    Returns:
        A scalar.
    """
    total = torch.zeros((), device=inputs[0].device)
    moments = [centered_moments(x, mean) for x, mean in zip(inputs, means, strict=True)]
    if pool is not None:
        moments = _pooled(moments, means, pool)
    for (batch_mean, batch_variance), mean, variance in zip(moments, means, variances, strict=True):
        total = total + ((batch_mean - mean) ** 2 + (batch_variance - variance) ** 2).mean()
    return total / len(inputs)


def _pooled(
    moments: Sequence[tuple[Tensor, Tensor]], means: Sequence[Tensor],
    pool: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    offsets = torch.cat([ours - mean for (ours, _), mean in zip(moments, means, strict=True)])
    offsets, variances = pool(offsets, torch.cat([variance for _, variance in moments]))
    sizes = [len(mean) for mean in means]
    return [
        (offset + mean, variance)
        for offset, mean, variance in zip(
            torch.split(offsets, sizes), means, torch.split(variances, sizes), strict=True
        )
    ]
