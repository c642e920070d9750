# SPDX-License-Identifier: Apache-2.0
"""Where fine-tuning begins: at the teacher's weights rounded to nearest, or at reconstructed ones.

At 3 and 4 bits rounding to nearest costs a student more than a short schedule can win back, and what it
wins back is far from what block reconstruction finds in less time. So a recipe may let reconstruction
go first, on the same images (``tuning.start``); fine-tuning then learns end to end what blocks by
themselves cannot see. The combination is this package's own.
"""

from __future__ import annotations

import torch

from zsq.config import Finetuning
from zsq.quantizers.minmax import MinMaxWeight
from zsq.runtime.context import Context
from zsq.student import Student, attach
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher
from zsq.tuning.reconstruct import reconstruct


def begin_with_reconstruction(
    teacher: Teacher, student: Student, images: ImageSet, context: Context
) -> None:
    """Let a student that is to be fine-tuned begin where reconstruction ends.

    Args:
        teacher: what the student was attached to.
        student: with ``tuning.start`` in its recipe; weights, biases and ranges are replaced.
        images: to reconstruct from.
        context: finished blocks are taken from, and kept in, its checkpoints.

    Raises:
        RunError: a loss became NaN.
    """
    settings = student.recipe.tuning
    assert isinstance(settings, Finetuning)
    recipe = student.recipe.model_copy(update={"tuning": settings.start})
    begun = attach(teacher, recipe)
    for name, quantizer in student.quantizers().items():
        if bool(quantizer.calibrated):  # learned with the equalization
            begun.quantizer(name).set_grid(quantizer.grid())
    go_on_from(student, reconstruct(teacher, begun, images, context.within("start")))


@torch.no_grad()
def go_on_from(student: Student, begun: Student) -> None:
    """Take over the integers, grids and biases of a frozen student of the same network."""
    tuned = begun.layers()
    for path, layer in student.layers().items():
        assert isinstance(layer.weight, MinMaxWeight)
        layer.weight.go_on_from(tuned[path].frozen)
        bias = tuned[path].bias
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    for name, quantizer in student.quantizers().items():
        quantizer.set_grid(begun.quantizer(name).grid())
        quantizer.enabled = True
