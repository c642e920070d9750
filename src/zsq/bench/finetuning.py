# SPDX-License-Identifier: Apache-2.0
"""Generator and student learning together, with gradient inundation, ready to be measured."""

from __future__ import annotations

from collections.abc import Iterator

from zsq.bench.loops import Job, Part, Step
from zsq.bench.plain_tuning import plain_finetuning
from zsq.bench.turns import Tick, TickingReporter
from zsq.config import Finetuning, GeneratorSynthesis
from zsq.runtime.context import Context
from zsq.runtime.policy import Policy
from zsq.student import attach
from zsq.synthesis.generators import build_generator
from zsq.synthesis.labels import plain_labels
from zsq.synthesis.learner import GeneratorLearner
from zsq.synthesis.objective import count_classes
from zsq.tuning.finetune import finetune

RECIPE = "gdfq+ait"
#: Steps of the generator alone; the last one sets the ranges of activations.
WARM_UP = 2


def finetuning_loop(job: Job) -> Iterator[Part]:
    """Yield fine-tuning at W4A4. Bare: generator and frozen teacher, then a float student's passes."""
    published = job.recipe(RECIPE, []).synthesis
    assert isinstance(published, GeneratorSynthesis)
    batch = job.batch or published.batch
    changes = [
        f"synthesis.batch={batch}", f"synthesis.steps={WARM_UP}", f"tuning.range_steps={WARM_UP}",
    ]  # fmt: skip
    recipe = job.recipe(RECIPE, changes)
    synthesis, tuning = recipe.synthesis, recipe.tuning
    assert isinstance(synthesis, GeneratorSynthesis)
    assert isinstance(tuning, Finetuning)

    def drive(tick: Tick) -> None:
        context = Context(policy=job.policy, reporter=TickingReporter(tick, job.note))

        def source(steps: int) -> GeneratorLearner:
            return GeneratorLearner(job.teacher, synthesis, context, steps)

        finetune(job.teacher, attach(job.teacher, recipe), source, context)

    def bare(policy: Policy, images: int, compile: bool) -> Step:
        return _passes(job, synthesis, policy, images, compile)

    yield Part(
        "finetuning", batch, job.policy, job.policy.worth_compiling(tuning.steps), tuning.steps,
        drive, bare, lambda: plain_finetuning(job.teacher, recipe, job.policy.device), skip=WARM_UP,
    )  # fmt: skip


def _passes(
    job: Job, settings: GeneratorSynthesis, policy: Policy, images: int, compile: bool
) -> Step:
    """Return the passes of a step: the generator learns from the teacher, the student from both."""
    classes, context = count_classes(job.teacher), Context(policy=policy)
    generator = policy.place(build_generator(job.teacher, settings, classes, context))
    teacher, student = job.network(policy), job.network(policy).requires_grad_(True)
    # as the loop does: on a CPU a compiled student is no faster
    fast_student = compile and policy.device.type == "cuda"
    make = policy.compiled(generator, enabled=compile, note=job.note)
    judge = policy.compiled(teacher, enabled=compile, note=job.note)
    learn = policy.compiled(student, enabled=fast_student, note=job.note)
    labels = plain_labels(images, classes, policy.device)
    noise = generator.draw_noise(labels)  # type: ignore[operator]
    free = [p for module in (generator, student) for p in module.parameters()]

    def step() -> None:
        with policy.autocast():
            made = make(noise, labels.classes, labels.weights)
            logits = judge(made)
        logits.float().square().mean().backward()
        with policy.autocast():
            answers = learn(made.detach())
        answers.float().square().mean().backward()
        for tensor in free:
            tensor.grad = None

    return step
