# SPDX-License-Identifier: Apache-2.0
"""A conditional generator that learns from the teacher, one step for every batch that it gives.

GDFQ (arXiv 2003.03603), Qimera (arXiv 2111.02625) and AutoReCon (arXiv 2105.12151) share this loop
and differ in the generator and in the labels that it is asked for. The generator learns to make
images that the teacher puts into the class asked for and whose batch statistics are those that the
teacher's batch norms remember. One pass of the teacher serves the generator's loss and, as the
distillation target, the student: it sees the images made *before* this step's update.

The processes of a group share a batch: each makes its part, statistics are those of the whole and
gradients are summed, so that a step is the one that a single process makes of all the images.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from zsq.config import GeneratorSynthesis
from zsq.runtime.context import Context
from zsq.runtime.optimizers import optimizer_state, restore_optimizer
from zsq.synthesis.batches import Batch
from zsq.synthesis.generators import build_generator
from zsq.synthesis.images import ImageSet, predict
from zsq.synthesis.labels import Labels, plain_labels, superposed_labels
from zsq.synthesis.objective import GeneratorObjective, count_classes
from zsq.teacher.teacher import Teacher

#: Momenta of Adam, as in all three papers.
BETAS = (0.5, 0.999)


class GeneratorLearner:
    """A generator and its optimiser: an `ImageSource` that learns.

    Args:
        teacher: must have batch norms with running statistics.
        settings: of the recipe.
        context: device, precision, compilation, group. Weights are drawn from torch's generator.
        steps: how often `next` will be called; short runs are not compiled.

    Attributes:
        generator: the network that makes the images.
        warmup: batches to let pass before a student learns.

    Raises:
        UsageError: a batch has fewer images than the group has processes.
    """

    def __init__(
        self, teacher: Teacher, settings: GeneratorSynthesis, context: Context, steps: int
    ) -> None:
        policy = context.policy
        self.teacher, self.settings, self.context = teacher, settings, context
        self.warmup = settings.steps
        self.classes = count_classes(teacher)
        group = context.group
        group.check_batch(settings.batch, "synthesis.batch")
        self.size = group.part_of(settings.batch)
        self.share = self.size / settings.batch
        self.generator = policy.place(build_generator(teacher, settings, self.classes, context))
        group.align(self.generator)
        alone = group.size == 1
        objective = GeneratorObjective(
            teacher, self.generator, settings.statistics_weight, policy,
            None if alone else partial(group.pool, share=self.share),
        )  # fmt: skip
        # a compiler cannot take exchanges between processes into its graph
        self.objective = policy.compiled(
            objective, enabled=alone and policy.worth_compiling(steps), note=context.reporter.note
        )
        self.rate = torch.tensor(settings.lr, device=policy.device)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=self.rate, betas=BETAS, fused=True
        )

    def draw_labels(self) -> Labels:
        """Draw what the next batch shows: classes, or mixtures of them for the whole batch."""
        settings, device = self.settings, self.context.policy.device
        if settings.superpose > 0:
            drawn = self.context.group.first_says(torch.rand(()))
            if float(drawn) < settings.superpose:
                return superposed_labels(self.size, self.classes, settings.mixed, device)
        return plain_labels(self.size, self.classes, device)

    def next(self, rate: float) -> Batch:
        """Make a batch, and one step at ``rate`` times the generator's own rate."""
        labels = self.draw_labels()
        noise = self.generator.draw_noise(labels)  # type: ignore[operator]
        soft = labels.soft(self.classes)
        loss, images, logits, entropy, distance = self.objective(
            noise, labels.classes, labels.weights, soft
        )
        self.optimizer.zero_grad()
        group = self.context.group
        # weighted before the backward pass, which goes through the other processes' statistics
        (loss if group.size == 1 else loss * self.share).backward()
        group.sum_gradients(self.generator.parameters())
        self.rate.fill_(self.settings.lr * rate)
        self.optimizer.step()
        terms = {"generator_ce": entropy.detach(), "generator_bns": distance.detach()}
        return Batch(images.detach(), logits.detach(), soft, terms, self.share)

    def draw(self, count: int) -> ImageSet:
        """Return ``count`` images of the generator as it is; labels are the teacher's predictions."""
        return ImageSet.shared(self.context.group, lambda: self._draw(count))

    @torch.no_grad()
    def _draw(self, count: int) -> ImageSet:
        settings = self.settings
        made = []
        for _ in range(math.ceil(count / settings.batch)):
            labels = plain_labels(settings.batch, self.classes, self.context.policy.device)
            noise = self.generator.draw_noise(labels)  # type: ignore[operator]
            with self.context.policy.autocast():
                images = self.generator(noise, labels.classes, labels.weights)
            made.append(images.float().cpu().contiguous())
        images = torch.cat(made)[:count]
        predicted = predict(self.teacher, images, self.context)
        return ImageSet(images, predicted, provenance(self.teacher, settings, self.context))

    def state(self) -> dict[str, Tensor]:
        """Return generator and optimiser as named tensors."""
        weights = {f"weights.{k}": v for k, v in self.generator.state_dict().items()}
        return weights | optimizer_state(self.optimizer, "adam")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        weights = {
            k.removeprefix("weights."): v for k, v in state.items() if k.startswith("weights.")
        }
        self.generator.load_state_dict(weights)
        restore_optimizer(self.optimizer, "adam", state)


def provenance(
    teacher: Teacher, settings: GeneratorSynthesis, context: Context
) -> dict[str, object]:
    """Say what made a generator's images."""
    return {
        "method": settings.generator, "settings": settings.model_dump(mode="json"),
        "seed": context.seed, "model": teacher.info.reference, "synthetic": True,
    }  # fmt: skip
