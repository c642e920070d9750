# SPDX-License-Identifier: Apache-2.0
"""The stages of a run: where its images come from, and what the student does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

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
from zsq.errors import UsageError
from zsq.evaluation.folder import load_images, open_for
from zsq.preparation import has_a_learning_generator, prepared
from zsq.runtime.ambient import own_modes
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.settings import OneSynthesis
from zsq.student import Student, attach, calibrate_student
from zsq.synthesis.batches import FixedImages
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.images import Images, ImageSet, image_set
from zsq.synthesis.learner import GeneratorLearner
from zsq.synthesis.objective import count_classes
from zsq.synthesis.pixels import synthesize_pixels
from zsq.synthesis.warming import synthesize_with_generator, warmed_generator
from zsq.teacher.teacher import Teacher
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
    _check_unfinished(student)
    images = image_set(images, teacher, context)
    if isinstance(student.recipe.tuning, Finetuning):
        images.check_labels(count_classes(teacher))
    context.group.align(student.network)
    student = _tune(teacher, student, images, context)
    context.group.align(student.network)
    return student


def _learning_together(recipe: Recipe) -> tuple[GeneratorSynthesis, Finetuning]:
    """Return how a generator learns, and how the student that learns with it.

    Raises:
        UsageError: the recipe has no such generator.
    """
    settings, tuning = recipe.synthesis, recipe.tuning
    if not isinstance(settings, GeneratorSynthesis) or not isinstance(tuning, Finetuning):
        raise UsageError(
            f"recipe {recipe.name!r} has no generator that learns with its student; use `tune` with the images of "
            "`synthesize`."
        )
    return settings, tuning


def _check_unfinished(student: Student) -> None:
    """Refuse to tune integers.

    Raises:
        UsageError: the student was tuned before.
    """
    if student.finished:
        raise UsageError(
            "this student is finished: its weights are integers, which nothing tunes; `prepare` makes another."
        )


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


@own_modes()
def tune_with_generator(
    teacher: Teacher, student: Student, *, original: Teacher | None = None,
    context: Context | None = None,
) -> tuple[Student, ImageSet]:  # fmt: skip
    """Fine-tune a student on the images of a generator that learns with it.

    Args:
        teacher: what the student was attached to.
        student: tuned in place.
        original: what the generator learns from, where that is not the teacher itself: an equalized
            one computes the same with another classifier, and Qimera's embeddings start from it.
        context: device, seed, progress, checkpoints.

    Returns:
        The student, frozen on integers, and images of the generator as it ended.

    Raises:
        UsageError: the teacher has no batch norm with running statistics.
        RunError: a loss became NaN.
    """
    context = context or Context()
    _check_unfinished(student)
    settings, tuning = _learning_together(student.recipe)
    context.group.align(student.network)
    if tuning.start is not None:
        warmed, images = warmed_generator(original or teacher, settings, context, tuning.steps)
        return _start_together(teacher, student, warmed, images, context)

    def learning(steps: int) -> GeneratorLearner:
        return GeneratorLearner(original or teacher, settings, context, settings.steps + steps)

    return _learn_together(teacher, student, learning, context)


def _start_together(
    teacher: Teacher, student: Student, warmed: GeneratorLearner, images: ImageSet, context: Context
) -> tuple[Student, ImageSet]:
    """Reconstruct the student from a generator's first images, then let both learn."""
    begin_with_reconstruction(teacher, student, images, context)
    return _learn_together(teacher, student, lambda steps: warmed, context)


def _learn_together(
    teacher: Teacher, student: Student, make_source: Callable[[int], GeneratorLearner],
    context: Context,
) -> tuple[Student, ImageSet]:  # fmt: skip
    """Fine-tune on a generator that goes on learning; return the student and images of its end."""
    student, source = finetune(teacher, student, make_source, context)
    context.group.align(student.network)
    with seeded(context.seed, "kept images"):
        return student, cast(GeneratorLearner, source).draw(student.recipe.synthesis.images)


def produce(
    teacher: Teacher, recipe: Recipe, images: Images, context: Context
) -> tuple[Student, ImageSet]:
    """Return the tuned student and the images it was tuned on."""
    if learns_together(recipe, images):
        return _produce_together(teacher, recipe, context)
    chosen = choose_images(teacher, recipe, images, context)
    return tuned(teacher, recipe, chosen, context), chosen


def _produce_together(
    teacher: Teacher, recipe: Recipe, context: Context
) -> tuple[Student, ImageSet]:
    """Let a generator and a student learn together.

    Where the student begins with a reconstruction, the generator's first images are there before it, and
    say how its channels are equalized.
    """
    settings, tuning = _learning_together(recipe)
    if tuning.start is None:
        ready, student = prepare(teacher, recipe, context=context)
        return tune_with_generator(ready, student, original=teacher, context=context)
    warmed, images = warmed_generator(teacher, settings, context, tuning.steps)
    ready, student = prepare(teacher, recipe, images, context=context)
    return _start_together(ready, student, warmed, images, context)


@own_modes()
def first_images(teacher: Teacher, recipe: Recipe, context: Context | None = None) -> ImageSet:
    """Return a generator's images from before a student learns with it.

    They are what `prepare` equalizes channels by where a recipe whose generator learns begins with a
    reconstruction (the quick ones of the GDFQ family); `tune_with_generator` makes the same ones again.

    Args:
        teacher: from `load_teacher`.
        recipe: resolved.
        context: seed, device, progress; defaults to seed 0 on the CPU in float32.

    Raises:
        UsageError: the teacher has no batch norm with running statistics, or the recipe no such generator.
        RunError: the loss became NaN.
    """
    context = context or Context()
    settings, tuning = _learning_together(recipe)
    return warmed_generator(teacher, settings, context, tuning.steps)[1]


def learns_together(recipe: Recipe, images: Images) -> bool:
    """Whether the images of a run come from a generator that learns with the student."""
    return images is None and has_a_learning_generator(recipe)


def tuned(teacher: Teacher, recipe: Recipe, images: ImageSet, context: Context) -> Student:
    """Fold and equalize, quantize, tune."""
    ready, student = prepare(teacher, recipe, images, context=context)
    return tune(ready, student, images, context=context)


@own_modes()
def prepare(
    teacher: Teacher, recipe: Recipe | str = "genie", images: ImageSet | Tensor | None = None, *,
    context: Context | None = None,
) -> tuple[Teacher, Student]:  # fmt: skip
    """Do everything between images and tuning that a recipe says: fold, equalize, put quantizers on.

    Args:
        teacher: from `load_teacher`; stays as it is.
        recipe: its protocol, bits, and how channels are equalized.
        images: an `ImageSet`, or a normalised tensor (N, C, H, W), which say how large channels are; None
            where a generator is still to make them; where it begins a reconstruction, those of `first_images`.
        context: seed, device, progress; defaults to seed 0 on the CPU in float32.

    Returns:
        The teacher to tune against, which computes the same, and the student, for `tune`.

    Raises:
        UsageError: nothing to quantize, or an override that matches nothing.
        RunError: the loss became NaN while channels' factors were learned.
    """
    recipe, context = load_recipe(recipe), context or Context()
    if images is not None:
        images = image_set(images, teacher, context)
    ready, grids = prepared(teacher, recipe, images, context)
    context.group.align(ready.network)
    student = attach(ready, recipe)
    for name, grid in grids.items():
        student.quantizer(name).set_grid(grid)
    return ready, student


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
