# SPDX-License-Identifier: Apache-2.0
"""A student and the generator of its images, learning together (the GDFQ family)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from zsq.config import Finetuning, GeneratorSynthesis, Recipe
from zsq.errors import UsageError
from zsq.preparation import prepare
from zsq.runtime.ambient import own_modes
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.student import Student
from zsq.synthesis.images import ImageSet
from zsq.synthesis.learner import GeneratorLearner
from zsq.synthesis.warming import warmed_generator
from zsq.teacher.teacher import Teacher
from zsq.tuning.finetune import finetune
from zsq.tuning.starting import begin_with_reconstruction


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
    student.check_unfinished()
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


def produce_together(
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
