# SPDX-License-Identifier: Apache-2.0
"""Where a student's batches come from: a set of images, or a generator that is still learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zsq.runtime.context import Context
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher

#: Images per pass of the teacher.
PASS = 128


@dataclass(frozen=True)
class Batch:
    """What a student learns from in one step.

    Attributes:
        images: (N, C, H, W), normalised, on the device that computes.
        logits: the teacher's, (N, classes).
        targets: the labels that the images were made for, as distributions (N, classes).
        terms: values to record, scalar tensors by name.
    """

    images: Tensor
    logits: Tensor
    targets: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class ImageSource(Protocol):
    """A stream of batches.

    Attributes:
        warmup: batches to let pass before the student learns.
    """

    warmup: int

    def next(self, rate: float) -> Batch:
        """Return the next batch; a source that learns makes a step at ``rate`` times its own rate."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next batches depend on, apart from torch's generators."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""


class FixedImages:
    """Batches of a set of images: a fresh permutation each time round, nothing dropped.

    Args:
        teacher: its logits are computed once.
        images: the set.
        batch: images per step, at most all.
        warmup: batches to let pass before the student learns.
        context: says where to compute.
    """

    def __init__(
        self, teacher: Teacher, images: ImageSet, batch: int, warmup: int, context: Context
    ) -> None:
        device = context.policy.device
        network = context.policy.place(teacher.network)
        self.warmup = warmup
        self.size = min(batch, len(images))
        self.images = images.images.to(device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            self.logits = torch.cat([network(part) for part in torch.split(self.images, PASS)])
        labels = images.labels.to(device)
        self.targets = one_hot(labels, self.logits.shape[1]).float()
        self.order = torch.empty(0, dtype=torch.long)

    def next(self, rate: float) -> Batch:
        """Return the next batch; ``rate`` means nothing here."""
        while len(self.order) < self.size:
            self.order = torch.cat([self.order, torch.randperm(len(self.images))])
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        chosen = chosen.to(self.images.device)
        return Batch(self.images[chosen], self.logits[chosen], self.targets[chosen])

    def state(self) -> dict[str, Tensor]:
        """Return what is left of the current permutation."""
        return {"order": self.order}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with a permutation."""
        self.order = state["order"]
