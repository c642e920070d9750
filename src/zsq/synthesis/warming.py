# SPDX-License-Identifier: Apache-2.0
"""A generator that learns by itself, before a student does or without one."""

from __future__ import annotations

import torch

from zsq.config import GeneratorSynthesis
from zsq.runtime.checkpoints import flat, part_of
from zsq.runtime.context import Context
from zsq.runtime.optimizers import generator_states, restore_generators
from zsq.runtime.seeds import seeded
from zsq.runtime.terms import check_weights, record_terms
from zsq.synthesis.images import ImageSet
from zsq.synthesis.learner import GeneratorLearner, provenance
from zsq.teacher.teacher import Teacher

#: Steps between two looks for NaN.
CHECK_EVERY = 50
#: Steps between two checkpoints.
CHECKPOINT_EVERY = 200


def synthesize_with_generator(
    teacher: Teacher, settings: GeneratorSynthesis, context: Context
) -> ImageSet:
    """Train a generator for its warm-up alone and draw images from it.

    Args:
        teacher: must have batch norms with running statistics.
        settings: of the recipe; its ``steps`` are all the training there is.
        context: seed, device, progress.

    Raises:
        UsageError: no batch norm has running statistics.
        RunError: the loss became NaN.
    """
    finished = context.checkpoints.load("generated")
    if finished is not None:
        made_by = provenance(teacher, settings, context)
        return ImageSet(finished["images"], finished["labels"], made_by)
    return warmed_generator(teacher, settings, context)[1]


def warmed_generator(
    teacher: Teacher, settings: GeneratorSynthesis, context: Context, more: int = 0
) -> tuple[GeneratorLearner, ImageSet]:
    """Train a generator for its warm-up; return it, ready to go on without one, and images of it.

    Args:
        teacher: must have batch norms with running statistics.
        settings: of the recipe.
        context: seed, device, progress; an interrupted warm-up goes on from its checkpoint.
        more: steps that will be made with it afterwards.

    Raises:
        UsageError: no batch norm has running statistics.
        RunError: the loss became NaN.
    """
    with seeded(context.seed, "generator", *context.group.stream):
        learner = GeneratorLearner(teacher, settings, context, settings.steps + more)
        start = _resume(learner, context)
        title = f"training the generator ({settings.generator})"
        with context.reporter.task(title, settings.steps, completed=start) as task:
            for step in range(start, settings.steps):
                terms = learner.next(1.0).terms
                if step % CHECK_EVERY == 0 or step == settings.steps - 1:
                    terms = context.group.mean(terms, learner.share)
                    record_terms(context, "synthesis", step, terms)
                task.advance(1, loss=terms["generator_bns"])
                if (step + 1) % CHECKPOINT_EVERY == 0 or step == settings.steps - 1:
                    _save(learner, context, step + 1)
        finished = context.checkpoints.load("generated")
        if finished is None:
            images = learner.draw(settings.images)
            finished = {"images": images.images, "labels": images.labels}
            context.checkpoints.save("generated", finished)
        context.flush()
    learner.warmup = 0
    made_by = provenance(teacher, settings, context)
    return learner, ImageSet(finished["images"], finished["labels"], made_by)


def _save(learner: GeneratorLearner, context: Context, done: int) -> None:
    """Keep everything that the remaining steps depend on, unless it is damaged."""
    check_weights(learner.generator.parameters(), done - 1)
    state = flat({"source": learner.state(), "random": generator_states()})
    context.checkpoints.save("generator", state | {"done": torch.tensor(done)})
    context.flush()
    context.begin_stream("generator", done)


def _resume(learner: GeneratorLearner, context: Context) -> int:
    """Take over the last checkpoint, if there is one; return the number of steps done."""
    state = context.checkpoints.load("generator")
    if state is None:
        return 0
    learner.restore(part_of(state, "source"))
    restore_generators(part_of(state, "random"))
    context.begin_stream("generator", int(state["done"]))
    return int(state["done"])
