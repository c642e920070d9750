# SPDX-License-Identifier: Apache-2.0
"""Setting the ranges of activations in the warm-up of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from zsq.config import Finetuning
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import calibrate
from zsq.quantizers.minmax import TrackedActivation
from zsq.runtime.group import Group
from zsq.student import Student

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


def freeze_ranges(
    student: Student, ranges: Ranges, images: Tensor, settings: Finetuning, group: Group
) -> None:
    """Replace tracked ranges by searched ones where the recipe says so.

    Args:
        student: whose activations are looked at.
        ranges: its quantizers by name.
        images: of the last batch, this process's part of it.
        settings: of the recipe.
        group: the processes that share the batch.
    """
    if settings.ranges == "minmax":
        return
    searched: dict[str, ActivationQuantizer] = {**ranges}
    for quantizer in ranges.values():
        quantizer.enabled = False
    calibrate(
        student.network, searched, [group.gather(images)], power=settings.power,
        asymmetric=settings.asymmetric, rule=settings.ranges, percentile=settings.percentile,
    )  # fmt: skip
    for quantizer in ranges.values():
        quantizer.enabled = True
