# SPDX-License-Identifier: Apache-2.0
"""The stages of a run: where its images come from, and what the student does with them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from zsq.config import (
    Finetuning,
    GeneratorSynthesis,
    MixedSynthesis,
    PixelSynthesis,
    RangeCalibration,
    Recipe,
    Reconstruction,
    load_recipe,
)
from zsq.evaluation.folder import load_images, open_for
from zsq.preparation import has_a_learning_generator, prepare
from zsq.runtime.ambient import own_modes
from zsq.runtime.context import Context
from zsq.settings import OneSynthesis
from zsq.student import Student, calibrate_student
from zsq.synthesis.batches import FixedImages
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.images import Images, ImageSet, image_set
from zsq.synthesis.objective import count_classes
from zsq.synthesis.pixels import synthesize_pixels
from zsq.synthesis.warming import synthesize_with_generator
from zsq.teacher.teacher import Teacher
from zsq.together import produce_together
from zsq.tuning.finetune import finetune
from zsq.tuning.reconstruct import reconstruct
from zsq.tuning.starting import begin_with_reconstruction


@own_modes()
def synthesize(
    teacher: Teacher, recipe: Recipe | str = "genie", *, context: Context | None = None
) -> ImageSet:
    """Make images from a teacher alone.

    Args:
        teacher: from `load_teacher`.
        recipe: its ``synthesis`` part says how and how many.
        context: seed, device, progress; defaults to seed 0 on the CPU in float32.

    Raises:
        UsageError: the teacher has no batch norm with running statistics.
        RunError: the loss became NaN.
    """
    settings, context = load_recipe(recipe).synthesis, context or Context()
    if isinstance(settings, MixedSynthesis):
        return _made_in_parts(teacher, settings, context)
    return _made(teacher, settings, context)


def _made_in_parts(teacher: Teacher, settings: MixedSynthesis, context: Context) -> ImageSet:
    """Make every part's share, each with chance, checkpoints and records of its own."""
    made = []
    for index, part in enumerate(settings.parts, start=1):
        context.reporter.note(
            f"synthesis, part {index} of {len(settings.parts)}: {part.images} images, method {part.method}"
        )
        made.append(_made(teacher, part, context.within(f"part {index}")))
    return ImageSet.joined(made)


def _made(teacher: Teacher, settings: OneSynthesis, context: Context) -> ImageSet:
    """Make images by one method."""
    if isinstance(settings, GeneratorSynthesis):
        return synthesize_with_generator(teacher, settings, context)
    if isinstance(settings, PixelSynthesis):
        return synthesize_pixels(teacher, settings, context)
    return synthesize_genie(teacher, settings, context)


@own_modes()
def tune(
    teacher: Teacher, student: Student, images: ImageSet | Tensor, *, context: Context | None = None
) -> Student:
    """Tune a student with its recipe's tuner.

    Args:
        teacher: what the student was attached to.
        student: tuned in place.
        images: an `ImageSet`, or a normalised tensor (N, C, H, W).
        context: seed, device, progress, checkpoints; defaults to seed 0 on the CPU in float32.

    Returns:
        The student, frozen on integers.

    Raises:
        UsageError: the images do not suit the network, or what the tuner learns from is not there.
        RunError: a loss became NaN.
    """
    context = context or Context()
    student.check_unfinished()
    images = image_set(images, teacher, context)
    if isinstance(student.recipe.tuning, Finetuning):
        images.check_labels(count_classes(teacher))
    context.group.align(student.network)
    student = _tune(teacher, student, images, context)
    context.group.align(student.network)
    return student


def _tune(teacher: Teacher, student: Student, images: ImageSet, context: Context) -> Student:
    settings = student.recipe.tuning
    if isinstance(settings, Reconstruction):
        return reconstruct(teacher, student, images, context)
    if isinstance(settings, RangeCalibration):
        context.policy.place(student.network)
        pixels = images.images.to(context.policy.device)
        calibrate_student(student, pixels, rule=settings.ranges)
        for quantizer in student.quantizers().values():
            if quantizer.bits == 8:
                quantizer.stretch(settings.margin)
        return student.freeze()

    if settings.start is not None:
        begin_with_reconstruction(teacher, student, images, context)

    def fixed(steps: int) -> FixedImages:
        return FixedImages(teacher, images, settings, context)

    return finetune(teacher, student, fixed, context)[0]


def produce(
    teacher: Teacher, recipe: Recipe, images: Images, context: Context
) -> tuple[Student, ImageSet]:
    """Return the tuned student and the images it was tuned on."""
    if learns_together(recipe, images):
        return produce_together(teacher, recipe, context)
    chosen = choose_images(teacher, recipe, images, context)
    return tuned(teacher, recipe, chosen, context), chosen


def learns_together(recipe: Recipe, images: Images) -> bool:
    """Whether the images of a run come from a generator that learns with the student."""
    return images is None and has_a_learning_generator(recipe)


def tuned(teacher: Teacher, recipe: Recipe, images: ImageSet, context: Context) -> Student:
    """Fold and equalize, quantize, tune."""
    ready, student = prepare(teacher, recipe, images, context=context)
    return tune(ready, student, images, context=context)


def choose_images(teacher: Teacher, recipe: Recipe, images: Images, context: Context) -> ImageSet:
    """Return the images to tune with: given, read from a folder, or synthesised.

    In a group process 0 is the one that is given images or reads them.
    """
    if images is None:
        return synthesize(teacher, recipe, context=context)
    return ImageSet.shared(context.group, lambda: _given_or_read(teacher, recipe, images, context))


def _given_or_read(
    teacher: Teacher, recipe: Recipe, images: ImageSet | Tensor | str | Path, context: Context
) -> ImageSet:
    if isinstance(images, ImageSet | Tensor):
        return image_set(images, teacher, context)
    opened = open_for(teacher.info, images)
    pixels, labels = load_images(opened, min(recipe.synthesis.images, len(opened)), context.seed)
    provenance: dict[str, object] = {
        "method": "real", "folder": str(images), "seed": context.seed, "synthetic": False,
    }  # fmt: skip
    return ImageSet(pixels, labels, provenance).check(teacher.info.input_shape)
