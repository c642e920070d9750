# SPDX-License-Identifier: Apache-2.0
"""Setting the ranges of activations in the warm-up of a fine-tuning run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from zsq.config import Finetuning
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import calibrate
from zsq.quantizers.minmax import TrackedActivation
from zsq.runtime.group import Group
from zsq.student import Student
from zsq.synthesis.batches import Batch

Ranges = Mapping[str, TrackedActivation]


def tracked_steps(settings: Finetuning, warmup: int) -> range:
    """Return the steps of a warm-up that move the ranges; the last of them freezes these.

    Example:
        >>> tracked_steps(Finetuning(range_steps=100), 400)
        range(300, 400)
    """
    latest = max(warmup - settings.range_steps, 0)
    first = latest if settings.range_start is None else min(settings.range_start, latest)
    return range(first, min(first + settings.range_steps, warmup))


@contextmanager
def tracking(ranges: Ranges, group: Group) -> Iterator[None]:
    """Let batches move ranges inside the block, and nothing move them after it.

    Args:
        ranges: quantizers by name.
        group: the processes whose batches count.
    """
    for quantizer in ranges.values():
        quantizer.enabled = quantizer.tracking = True
        quantizer.widen = group.extremes
    try:
        yield
    finally:
        for quantizer in ranges.values():
            quantizer.tracking = False
            quantizer.widen = None


class RangeSearch:
    """What a warm-up does where a recipe searches ranges: it keeps its last batches and looks at them once.

    Args:
        student: whose activations are looked at.
        ranges: its quantizers by name.
        settings: of the recipe.
        group: the processes that share every batch.
    """

    def __init__(
        self, student: Student, ranges: Ranges, settings: Finetuning, group: Group
    ) -> None:
        self.student, self.ranges = student, ranges
        self.settings, self.group = settings, group
        self.kept: list[Tensor] = []

    def look(self, batch: Batch, left: int) -> None:
        """Keep a batch if it is among the last that are needed; choose the ranges with the last.

        Args:
            batch: this process's part of it.
            left: batches that will still come.
        """
        total = round(len(batch.images) / batch.share)
        if left < math.ceil(self.settings.calibration_images / total):
            self.kept.append(self.group.gather(batch.images))
        if left == 0:
            self._choose()

    @torch.no_grad()
    def _choose(self) -> None:
        searched: dict[str, ActivationQuantizer] = {**self.ranges}
        for quantizer in self.ranges.values():
            quantizer.enabled = False
        calibrate(
            self.student.network, searched, self.kept, power=self.settings.power,
            asymmetric=self.settings.asymmetric, rule=self.settings.ranges,
            percentile=self.settings.percentile,
        )  # fmt: skip
        for quantizer in self.ranges.values():
            quantizer.enabled = True
        self.kept = []

    def state(self) -> dict[str, Tensor]:
        """Return the batches that are kept, for a run that is interrupted amid its warm-up."""
        return {f"{i:06d}": images for i, images in enumerate(self.kept)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned, where the student computes."""
        device = next(self.student.network.parameters()).device
        self.kept = [state[name].to(device) for name in sorted(state)]
