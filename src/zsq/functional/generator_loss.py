# SPDX-License-Identifier: Apache-2.0
"""What a conditional generator learns from: the class asked for, and the batch norms' statistics."""

from __future__ import annotations

from collections.abc import Sequence

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
    inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor]
) -> Tensor:
    """Distance between batch statistics and stored ones (BNS; GDFQ, arXiv 2003.03603).

    Squared differences of mean and *biased variance*, averaged over channels, then over layers.
    (GENIE's distance, `zsq.functional.statistics.batch_norm_loss`, compares standard deviations and
    sums over layers.)

    Args:
        inputs: batch norm inputs, each (N, C_l, ...).
        means: stored means, each (C_l,).
        variances: stored variances, each (C_l,).

    Returns:
        A scalar.
    """
    total = torch.zeros((), device=inputs[0].device)
    for x, mean, variance in zip(inputs, means, variances, strict=True):
        batch_mean, batch_variance = centered_moments(x, mean)
        total = total + ((batch_mean - mean) ** 2 + (batch_variance - variance) ** 2).mean()
    return total / len(inputs)
