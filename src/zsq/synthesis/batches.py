# SPDX-License-Identifier: Apache-2.0
"""Where a student's batches come from: a set of images, or a generator that is still learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zsq.config import Finetuning
from zsq.functional.crop import crop, random_windows
from zsq.runtime.context import Context
from zsq.synthesis.images import ImageSet
from zsq.synthesis.objective import count_classes
from zsq.teacher.teacher import Teacher

#: Images per pass of the teacher.
PASS = 128


def batch_sizes(images: int, batch: int) -> list[int]:
    """Split ``images`` into the fewest batches of at most ``batch``, as equal as possible.

    Statistics of a tiny last batch would be noise, so the remainder is spread.

    Example:
        >>> batch_sizes(300, 128)
        [100, 100, 100]
    """
    count = math.ceil(images / batch)
    return [images // count + (i < images % count) for i in range(count)]


def side_by_side(sizes: list[int], parallel: int) -> list[tuple[int, ...]]:
    """Put up to ``parallel`` batches of equal size next to each other.

    Example:
        >>> side_by_side([4, 4, 4, 3], 2)
        [(4, 4), (4,), (3,)]
    """
    equal = [tuple(same) for _, same in groupby(sizes)]
    return [run[i : i + parallel] for run in equal for i in range(0, len(run), parallel)]


@dataclass(frozen=True)
class Batch:
    """What a student learns from in one step.

    Attributes:
        images: (N, C, H, W), normalised, on the device that computes.
        logits: the teacher's, (N, classes); None where whoever learns has to ask the teacher.
        targets: the labels that the images were made for, as distributions (N, classes).
        terms: values to record, scalar tensors by name.
        share: of these images in the total batch of all processes.
    """

    images: Tensor
    logits: Tensor | None
    targets: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    share: float = 1.0


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

    The processes of a group share a batch: process 0 draws the order, each takes its slice.

    Args:
        teacher: its logits are computed once; not at all if every look at an image is another crop.
        images: the set.
        settings: images per step (at most all), crops, batches that set ranges.
        context: says where to compute.

    Raises:
        UsageError: a label is not a class of the teacher, or a batch has fewer images than the group
            has processes.
    """

    def __init__(
        self, teacher: Teacher, images: ImageSet, settings: Finetuning, context: Context
    ) -> None:
        device = context.policy.device
        self.warmup = settings.range_steps if settings.start is None else 0
        self.size = min(settings.batch, len(images))
        self.group = context.group
        self.group.check_batch(self.size, "tuning.batch")
        self.crop = settings.crop
        self.images = images.images.to(device).contiguous(memory_format=torch.channels_last)
        self.logits = None if self.crop is not None else _logits_of(teacher, self.images, context)
        classes = count_classes(teacher)
        labels = images.check_labels(classes).labels
        self.targets = one_hot(labels, classes).float().to(device)
        self.order = torch.empty(0, dtype=torch.long)

    def next(self, rate: float) -> Batch:
        """Return the next batch; ``rate`` means nothing here."""
        while len(self.order) < self.size:
            fresh = self.group.first_says(torch.randperm(len(self.images)))
            self.order = torch.cat([self.order, fresh])
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        # not waited for: the host runs ahead of the device
        chosen = self.group.part(chosen).to(self.images.device, non_blocking=True)
        share = len(chosen) / self.size
        images, targets = self.images[chosen], self.targets[chosen]
        if self.crop is None:
            assert self.logits is not None
            return Batch(images, self.logits[chosen], targets, share=share)
        windows = random_windows(len(chosen), self.crop.smallest, self.crop.probability)
        windows = windows.to(images.device, non_blocking=True)
        return Batch(crop(images, windows), None, targets, share=share)

    def state(self) -> dict[str, Tensor]:
        """Return what is left of the current permutation."""
        return {"order": self.order}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with a permutation."""
        self.order = state["order"]


@torch.no_grad()
def _logits_of(teacher: Teacher, images: Tensor, context: Context) -> Tensor:
    """Return a teacher's logits of images that lie where it is to compute."""
    network = context.policy.placed_copy(teacher.network)
    return torch.cat([network(part) for part in torch.split(images, PASS)])
