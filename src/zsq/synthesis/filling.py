# SPDX-License-Identifier: Apache-2.0
"""How many batches are made side by side: as many as fill a GPU.

A small network leaves most of a large GPU idle, whatever the batch that its method publishes. How many
batches it takes is measured, with the passes through the teacher that synthesis consists of. On a CPU
it is always one: a batch fills it, and images made twice are the same to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from zsq.runtime.context import Context
from zsq.runtime.policy import Policy, synchronize
from zsq.runtime.shelf import room_for_work
from zsq.synthesis.slicing import AT_WORK, kept_per_image
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import Teacher

#: More batches pay where each then takes at most this share of the time.
WORTH = 0.9
#: Of the memory, for the teacher's passes; generators, optimisers and records need the rest.
SHARE = 0.5
#: Passes to time; the fastest counts.
TRIES = 3
CHECKPOINT = "synthesis_side_by_side"


def batches_at_a_time(
    asked: int | None, sizes: list[int], teacher: Teacher, context: Context
) -> int:
    """Return how many batches to make side by side.

    Args:
        asked: ``synthesis.parallel`` of the recipe; None: as many as fill the GPU.
        sizes: images of each batch.
        teacher: what they are sent through.
        context: process 0 of its group decides for all; a resumed run goes on with what was decided.
    """
    if asked is not None:
        return asked
    if context.policy.device.type == "cpu":
        return 1
    saved = context.checkpoints.load(CHECKPOINT)
    if saved is not None:  # before anything else: perhaps by another number of processes
        return int(saved["count"])
    alike = max(len(tuple(same)) for _, same in groupby(sizes))
    most = math.ceil(alike / context.group.size)  # no process is left without work
    passes = Passes.of(teacher, max(sizes), context.policy)
    count = context.group.from_first(lambda: _measured(most, passes, context))
    context.checkpoints.save(CHECKPOINT, {"count": torch.tensor(count)})
    return count


def _measured(most: int, passes: Passes, context: Context) -> int:
    fits = int(SHARE * room_for_work(context.policy) / max(1, passes.kept_bytes()))
    count = filling(min(most, fits), passes.seconds)
    if count > 1:
        context.reporter.note(
            f"synthesis: {count} of the batches of {passes.batch[0]} images are made side by side, as "
            "one does not fill the GPU (--set synthesis.parallel=1 makes them one by one)"
        )
    return count


def filling(most: int, seconds: Callable[[int], float]) -> int:
    """Return the number of batches at which more of them stop being worth it.

    Args:
        most: that may be side by side.
        seconds: says how long a step takes with so many batches; infinite where they do not fit.

    Returns:
        1, or the last of 2, 4, 8 ... ``most`` at which a batch took at most `WORTH` of the time it took
        at the number before, made smaller where as many rounds do with fewer batches each.

    Example:
        >>> filling(6, lambda count: 1.0 if count <= 4 else count / 4)
        3
    """
    if most <= 1:
        return 1
    count, each = 1, seconds(1)
    while count < most:
        wider = min(2 * count, most)
        now = seconds(wider) / wider
        if now > WORTH * each:
            break
        count, each = wider, now
    return math.ceil(most / math.ceil(most / count))


@dataclass(frozen=True)
class Passes:
    """Batches of blank images through a teacher, forward and back to the images.

    Attributes:
        tapped: the teacher; returns what its batch norms are given.
        batch: shape of a batch, (N, C, H, W).
        policy: where and how to compute.
    """

    tapped: nn.Module
    batch: tuple[int, ...]
    policy: Policy

    @classmethod
    def of(cls, teacher: Teacher, batch: int, policy: Policy) -> Passes:
        """Prepare passes of a teacher.

        Raises:
            UsageError: no batch norm has running statistics.
        """
        tapped, _ = tap_batch_norms(teacher.network)
        return cls(policy.placed_copy(tapped), (batch, *teacher.info.input_shape), policy)

    def seconds(self, count: int) -> float:
        """Return how long so many batches take together; infinite where the memory is too small."""
        images = self._blank(count * self.batch[0])
        try:
            self._time(images)  # kernels are chosen and memory is taken at the first
            return min(self._time(images) for _ in range(TRIES))
        except torch.OutOfMemoryError:
            return math.inf

    def kept_bytes(self) -> int:
        """Return the bytes that passes of one batch keep and work with."""
        per_image = kept_per_image(lambda count: self._loss(self._blank(count)))
        return int(AT_WORK * self.batch[0] * per_image)

    def _blank(self, count: int) -> Tensor:
        images = torch.zeros(count, *self.batch[1:], device=self.policy.device)
        return images.contiguous(memory_format=torch.channels_last).requires_grad_()

    def _loss(self, images: Tensor) -> Tensor:
        with self.policy.autocast():
            inputs = self.tapped(images)
        return torch.stack([x.float().square().mean() for x in inputs]).sum()

    def _time(self, images: Tensor) -> float:
        synchronize(self.policy.device)
        start = time.perf_counter()
        torch.autograd.grad(self._loss(images), images)
        synchronize(self.policy.device)
        return time.perf_counter() - start
