# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: a student learns end to end from a stream of images and the teacher's logits.

The images may come from a generator that is itself learning (GDFQ, Qimera, AutoReCon) or from a
fixed set. First a warm-up, in which only the source moves; its last steps track the ranges of
activations, which are frozen then. A student that was reconstructed before (`zsq.tuning.starting`) has
its ranges, and needs no warm-up. From there on master weights, biases, gamma and beta learn by SGD
through the rounding (straight-through), while batch norms keep the teacher's statistics. With
`inundation` in the recipe the step of every weight tensor is scaled until enough of its integers
change (AIT, arXiv 2203.17008); `zsq.tuning.inundation` is that rule.

The processes of a group share every batch. Ranges are widened to all of it and gradients are summed
before anything is decided, so that every process takes the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq.config import Finetuning
from zsq.functional.agreement import gradient_cosines
from zsq.functional.crossing import crossing_multipliers
from zsq.functional.schedules import milestone_factor
from zsq.quantizers.minmax import MinMaxWeight, TrackedActivation
from zsq.runtime.checkpoints import flat, part_of
from zsq.runtime.context import Context
from zsq.runtime.optimizers import (
    generator_states,
    optimizer_state,
    restore_generators,
    restore_optimizer,
)
from zsq.runtime.seeds import seeded
from zsq.runtime.terms import check_weights, record_terms
from zsq.student import Student
from zsq.synthesis.batches import Batch, ImageSource
from zsq.teacher.teacher import Teacher
from zsq.tuning.averaging import RunningAverage
from zsq.tuning.fusing import fused_rounding
from zsq.tuning.inundation import InundatedSGD
from zsq.tuning.objective import Objective
from zsq.tuning.promotion import learn_from_harder
from zsq.tuning.ranges import RangeSearch, tracked_steps, tracking
from zsq.tuning.watch import IntegerWatch

#: Steps between two records, and so between two reads of the device.
RECORD_EVERY = 50
#: Steps between two checkpoints.
CHECKPOINT_EVERY = 200


def finetune(
    teacher: Teacher,
    student: Student,
    make_source: Callable[[int], ImageSource],
    context: Context,
) -> tuple[Student, ImageSource]:
    """Let a student learn from a source of images.

    Args:
        teacher: what the student was attached to.
        student: from `zsq.student.attach`, unfrozen; tuned in place.
        make_source: builds the source for a number of steps; drawn numbers, its initial weights
            among them, come from the run's seed.
        context: an interrupted run goes on from its checkpoint, with the same results.

    Returns:
        The student, frozen on integers, and the source as it ended.

    Raises:
        RunError: a loss became NaN.
    """
    settings = student.recipe.tuning
    assert isinstance(settings, Finetuning)
    with seeded(context.seed, "finetune", *context.group.stream):
        source = make_source(settings.steps)
        loop = FineTuner(teacher, student, source, settings, context)
        total = source.warmup + settings.steps
        start = loop.resume()
        with (
            context.reporter.task("fine-tuning", total, completed=start) as task,
            fused_rounding(
                loop.ranges.values(), context.policy, settings.steps, context.reporter.note
            ),
        ):
            for step in range(start, total):
                task.advance(1, loss=loop.step(step))
                if (step + 1) % CHECKPOINT_EVERY == 0 or step == total - 1:
                    loop.save(step + 1)
        loop.average.settle()
    return student.freeze(), source


class FineTuner:
    """The state of a fine-tuning run; `finetune` drives it.

    Args:
        teacher: what the student was attached to.
        student: tuned in place.
        source: gives the batches.
        settings: of the recipe.
        context: device, precision, compilation, checkpoints.

    Attributes:
        total: steps in all, warm-up included.
        weight_rule: moves the quantized weights.
    """

    def __init__(
        self, teacher: Teacher, student: Student, source: ImageSource, settings: Finetuning,
        context: Context,
    ) -> None:  # fmt: skip
        self.student, self.source = student, source
        self.settings, self.context = settings, context
        context.policy.place(student.network)
        self.total = source.warmup + settings.steps
        self.weights = {
            path: layer.weight
            for path, layer in student.layers().items()
            if isinstance(layer.weight, MinMaxWeight)
        }
        self.ranges = {
            name: quantizer
            for name, quantizer in student.quantizers().items()
            if isinstance(quantizer, TrackedActivation)
        }
        self.search = RangeSearch(student, self.ranges, settings, context.group)
        self.rest = _other_parameters(student, self.weights)
        self.trained = [*(weight.master for weight in self.weights.values()), *self.rest]
        rule = settings.inundation
        self.weight_rule = InundatedSGD(
            self.weights, momentum=settings.momentum, weight_decay=settings.weight_decay,
            grid=rule.grid if rule else "frozen", guarantee=rule.guarantee if rule else True,
            crossings=context.policy.compiled(
                crossing_multipliers, enabled=context.policy.worth_compiling(settings.steps),
                note=context.reporter.note, dynamic=True,
            ),
        )  # fmt: skip
        self.rest_rule = torch.optim.SGD(
            [{"params": self.rest}], lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.objective = Objective(teacher, student, settings, context)
        self.watch = IntegerWatch(self.weights)
        self.changed: dict[str, float] = {}
        self.average = RunningAverage(self.trained, settings.average)

    def step(self, step: int) -> Tensor:
        """Make one step of the source, of the ranges or of the student; return a loss to show."""
        factor = milestone_factor(step / self.total, self.settings.milestones, self.settings.decay)
        recorded = step % RECORD_EVERY == 0 or step == self.total - 1
        batch = self.source.next(factor)
        if step < self.source.warmup:
            self._warm_up(batch, step)
            terms: dict[str, Tensor] = {}
        else:
            measure = recorded and self.context.metrics is not None
            terms = self._learn(batch, step - self.source.warmup, factor, measure=measure)
            self.average.update(step - self.source.warmup)
            self._snapshot(step - self.source.warmup)
        if recorded:
            self._record(step, self.context.group.mean(batch.terms | terms, batch.share))
        return next(iter((terms | batch.terms).values()), torch.zeros(()))

    @torch.no_grad()
    def _warm_up(self, batch: Batch, step: int) -> None:
        """Track ranges in some steps of the warm-up, or search them on the last images of those."""
        steps = tracked_steps(self.settings, self.source.warmup)
        if step not in steps:
            return
        if self.settings.ranges == "minmax":
            with tracking(self.ranges, self.context.group):
                self.student(batch.images)
        else:
            self.search.look(batch, steps[-1] - step)

    def _learn(self, batch: Batch, step: int, factor: float, *, measure: bool) -> dict[str, Tensor]:
        """Make one step of the student; ``measure`` which share of its integers it changed."""
        every = self.settings.agreement_every
        if every and step % every == 0 and self.context.metrics is not None:
            self._compare_gradients(batch, step + self.source.warmup)
        self.rest_rule.zero_grad()
        self.weight_rule.zero_grad()
        if self.settings.promotion is None:
            loss, terms = self.objective(batch.images, self.objective.lesson(batch))
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            terms = learn_from_harder(
                self.objective, batch, self.settings.promotion, self.weights.values()
            )
        self.context.group.sum_gradients(self.trained, batch.share)
        before = self.watch.codes() if measure else {}
        rate = self.settings.lr * factor
        for group in self.rest_rule.param_groups:
            group["lr"] = rate
        self.rest_rule.step()
        rule = self.settings.inundation
        if rule is None:
            self.weight_rule.step(rate, measure=False)
        else:
            cap = rule.first_cap if step < rule.first_steps else rule.cap
            target = rule.target * factor
            self.weight_rule.step(rate, target=target, cap=cap, measure=False)
        if measure:
            self.changed = self.watch.changed_since(before)
        return {name: term.detach() for name, term in terms.items()}

    def _snapshot(self, step: int) -> None:
        """Keep the weights, evenly often and at the end, where the recipe asks for it."""
        count, done = self.settings.snapshots, step + 1
        if count and (done * count) // self.settings.steps > (step * count) // self.settings.steps:
            masters = {path: weight.master.detach() for path, weight in self.weights.items()}
            self.context.checkpoints.save(f"path_{done:06d}", masters)

    def _compare_gradients(self, batch: Batch, step: int) -> None:
        """Record whether loss terms pull the same way (AIT, section 3)."""
        terms = self.settings.agreement_terms
        losses = self.objective.separate(batch.images, self.objective.lesson(batch), terms)
        masters = {path: weight.master for path, weight in self.weights.items()}
        self.context.record("agreement", step, **gradient_cosines(losses, masters))

    def _record(self, step: int, terms: dict[str, Tensor]) -> None:
        """Record loss terms and, once the student learns, what happened to each layer's integers."""
        layers: dict[str, Any] = {}
        if self.context.metrics is not None and step >= self.source.warmup:
            names, rule = self.weight_rule.names, self.weight_rule
            layers["changed"] = self.changed
            layers["multiplier"] = dict(zip(names, rule.multipliers.tolist(), strict=True))
            layers["moved"] = self.watch.look()
        record_terms(self.context, "finetune", step, terms, **layers)

    def save(self, done: int) -> None:
        """Keep everything that the remaining steps depend on, unless it is damaged.

        Raises:
            RunError: a weight is NaN or infinite; the last checkpoint stays as it is.
        """
        check_weights(self.trained, done - 1)
        parts: dict[str, dict[str, Tensor]] = {
            "source": self.source.state(), "rule": self.weight_rule.state_dict(),
            "random": generator_states(), "watch": self.watch.state(),
            "weights": {path: weight.master for path, weight in self.weights.items()},
            "rest": {str(i): parameter for i, parameter in enumerate(self.rest)},
            "average": self.average.state(), "search": self.search.state(),
            "ranges": flat({name: q.state_dict() for name, q in self.ranges.items()}),
        }  # fmt: skip
        state = flat(parts) | optimizer_state(self.rest_rule, "sgd")
        self.context.checkpoints.save("finetune", state | {"done": torch.tensor(done)})
        self.context.flush()
        self.context.begin_stream("finetune", done)

    @torch.no_grad()
    def resume(self) -> int:
        """Take over the last checkpoint, if there is one; return the number of steps done."""
        state = self.context.checkpoints.load("finetune")
        if state is None:
            return 0
        self.source.restore(part_of(state, "source"))
        self.weight_rule.load_state_dict(part_of(state, "rule"))
        self.watch.restore(part_of(state, "watch"))
        self.average.restore(part_of(state, "average"))
        self.search.restore(part_of(state, "search"))
        restore_optimizer(self.rest_rule, "sgd", state)
        for path, weight in self.weights.items():
            weight.master.copy_(state[f"weights.{path}"])
        for i, parameter in enumerate(self.rest):
            parameter.copy_(state[f"rest.{i}"])
        for name, quantizer in self.ranges.items():
            quantizer.load_state_dict(part_of(state, f"ranges.{name}"))
            quantizer.enabled = bool(quantizer.calibrated)
        restore_generators(part_of(state, "random"))
        self.context.begin_stream("finetune", int(state["done"]))
        return int(state["done"])


def _other_parameters(student: Student, weights: dict[str, MinMaxWeight]) -> list[Tensor]:
    """Return what learns besides the quantized weights: biases, gamma and beta."""
    masters = {id(weight.master) for weight in weights.values()}
    fixed = {id(p) for q in student.quantizers().values() for p in q.parameters()}
    found: list[Tensor] = []
    for parameter in student.network.parameters():
        parameter.requires_grad_(id(parameter) not in fixed)
        if parameter.requires_grad and id(parameter) not in masters:
            found.append(parameter)
    return found
