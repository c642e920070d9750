# SPDX-License-Identifier: Apache-2.0
"""Feature alignment: a student's channels should matter as much as the teacher's (HAST)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def channel_attention(features: Tensor) -> Tensor:
    """Return how much each channel matters: its mean square, normalised to length 1 per image.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, C) float32, unchanged when the features are multiplied by a positive number.

    Example:
        >>> channel_attention(torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]]))
        tensor([[1., 0.]])
    """
    return normalize(features.float().square().flatten(2).mean(2), dim=1)


def alignment_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of channel attention (HAST, arXiv 2303.13826, section 3.4).

    Args:
        student: block outputs, each (N, C_b, H_b, W_b).
        teacher: likewise; no gradient reaches them unless they carry one.

    Returns:
        A scalar: averaged over images and channels, summed over blocks.
    """
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        total = total + (channel_attention(ours) - channel_attention(theirs)).square().mean()
    return total
