# SPDX-License-Identifier: Apache-2.0
"""What a student learns from: divergence from the teacher, agreement with labels, a block's error."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 20.0,
    mean: Literal["element", "sample"] = "element",
) -> Tensor:
    """Return ``temperature**2 * KL(teacher || student)`` of softened predictions.

    Published code averages over images *and classes*: the gradient of a logit is then its gap
    divided by ``images * classes**2``, a thousand times less on ImageNet than with the mean over
    images. At a high temperature the former equals ``mean(gap**2) / (2 * classes)``, with the gap's
    mean over classes removed.

    Args:
        student: logits (N, C); of float64 for a divergence so small that float32 rounds it away.
        teacher: logits (N, C).
        temperature: of both softmaxes.
        mean: over elements, as published (GDFQ, arXiv 2003.03603), or over samples.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, -1.0]])
        >>> kl_divergence(logits, logits).item()
        0.0
    """
    kind = torch.promote_types(student.dtype, torch.float32)
    wanted = (teacher.to(kind) / temperature).log_softmax(1)
    given = (student.to(kind) / temperature).log_softmax(1)
    total = (wanted.exp() * (wanted - given)).sum()
    count = student.numel() if mean == "element" else len(student)
    return total * (temperature**2 / count)


def reconstruction_error(
    outputs: Tensor, target: Tensor, power: float, importance: Tensor | None = None
) -> Tensor:
    """Sum ``importance * |outputs - target|**power`` over channels, average over everything else.

    Args:
        outputs: (N, C, ...) float32.
        target: likewise.
        power: positive.
        importance: what an error of each channel counts, (C,); None: all the same.

    Example:
        >>> import torch
        >>> float(reconstruction_error(torch.ones(4, 3, 2, 2), torch.zeros(4, 3, 2, 2), 2.0))
        3.0
    """
    if importance is not None:
        weight = importance.reshape(-1, *[1] * (target.ndim - 2))
        total = ((outputs - target).abs().pow(power) * weight).sum()
    elif power == 2:
        total = functional.mse_loss(outputs, target, reduction="sum")
    else:
        total = (outputs - target).abs().pow(power).sum()
    return total * (target.shape[1] / target.numel())
