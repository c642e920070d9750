# SPDX-License-Identifier: Apache-2.0
"""Sample difficulty promotion: a student also learns from images made harder for it.

HAST (arXiv 2303.13826, section 3.3) moves every pixel one small step uphill on the student's own
loss and learns from the clean and the harder images alike. The loss on clean images is propagated
once: its gradient with respect to the pixels says where uphill is, its gradient with respect to the
student is half of what it learns from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from zsq.config import Promotion
from zsq.quantizers.minmax import MinMaxWeight
from zsq.synthesis.batches import Batch
from zsq.tuning.objective import Objective


@contextmanager
def rounded_once(weights: Iterable[MinMaxWeight]) -> Iterator[None]:
    """Let every pass inside the block share one rounding of each weight."""
    weights = list(weights)
    for weight in weights:
        weight.held = weight()
    try:
        yield
    finally:
        for weight in weights:
            weight.held = None


def harder(images: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """Return images moved by ``epsilon`` along the sign of a gradient.

    Example:
        >>> import torch
        >>> harder(torch.zeros(3), torch.tensor([-2.0, 0.0, 0.1]), 0.5)
        tensor([-0.5000,  0.0000,  0.5000])
    """
    return images.detach() + epsilon * gradient.sign()


def learn_from_harder(
    objective: Objective, batch: Batch, settings: Promotion, weights: Iterable[MinMaxWeight]
) -> dict[str, Tensor]:
    """Add the gradients of the loss on a batch and on its harder version to the student's.

    Args:
        objective: the student's loss.
        batch: clean images.
        settings: how much harder.
        weights: of the student; rounded once for both passes.

    Returns:
        The weighted terms of the clean images, and of the harder ones as ``NAME_harder``.
    """
    images = batch.images.detach().requires_grad_()
    clean = replace(batch, images=images)
    with rounded_once(weights):
        loss, terms = objective(
            images, objective.lesson(clean, differentiable=settings.through_teacher)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        assert images.grad is not None
        moved = replace(batch, images=harder(images, images.grad, settings.epsilon), logits=None)
        loss, others = objective(moved.images, objective.lesson(moved))
        (settings.weight * loss).backward()  # type: ignore[no-untyped-call]
    found = terms | {f"{name}_harder": term for name, term in others.items()}
    return {name: term.detach() for name, term in found.items()}
