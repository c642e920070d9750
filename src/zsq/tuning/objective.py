# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuned student learns from: named, weighted terms of its outputs and the teacher's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.config import Finetuning, Recipe
from zsq.errors import UsageError
from zsq.functional.alignment import alignment_loss
from zsq.functional.generator_loss import soft_cross_entropy
from zsq.functional.losses import kl_divergence
from zsq.runtime.context import Context
from zsq.student import Student, prepared_network
from zsq.synthesis.batches import Batch
from zsq.teacher.blocks import block_outputs, tap_nodes
from zsq.teacher.teacher import ModelInfo, Teacher


def aligned_blocks(network: GraphModule, info: ModelInfo) -> dict[str, int]:
    """Return the block outputs that feature terms compare, and the axis of their channels.

    Raises:
        UsageError: there are none.
    """
    blocks = block_outputs(network, info.input_shape)
    if not blocks:
        raise UsageError(
            f"no block of {info.reference} puts out a feature map (N, C, H, W), so there is nothing "
            "to align; leave the term out with --set tuning.losses.alignment=0."
        )
    return blocks


def check_terms(teacher: Teacher, recipe: Recipe) -> None:
    """Refuse a recipe whose terms a network has nothing for, before any image is made.

    Raises:
        UsageError: features are compared and there are none.
    """
    tuning = recipe.tuning
    if isinstance(tuning, Finetuning) and _compares_features(tuning):
        aligned_blocks(prepared_network(teacher, recipe), teacher.info)


@dataclass(frozen=True)
class Lesson:
    """What one pass of the student is compared with.

    Attributes:
        logits: the teacher's, (N, classes).
        targets: distributions over classes, (N, classes).
        features: the teacher's block outputs, where a term compares them.
    """

    logits: Tensor
    targets: Tensor
    features: tuple[Tensor, ...] = ()


#: The terms: functions of the student's logits and block outputs, the lesson, and the settings.
TERMS: dict[str, Callable[[Tensor, tuple[Tensor, ...], Lesson, Finetuning], Tensor]] = {
    "kl": lambda outputs, features, lesson, settings: kl_divergence(
        outputs, lesson.logits, settings.temperature, settings.kl_mean
    ),
    "ce": lambda outputs, features, lesson, settings: soft_cross_entropy(outputs, lesson.targets),
    "alignment": lambda outputs, features, lesson, settings: alignment_loss(
        features, lesson.features
    ),
}
#: Terms that compare block outputs.
FEATURE_TERMS = frozenset({"alignment"})


def _compares_features(settings: Finetuning) -> bool:
    """Whether a term that is learned from, or whose gradient is watched, compares block outputs."""
    learned = {name for name, weight in settings.losses.model_dump().items() if weight}
    watched = settings.agreement_terms if settings.agreement_every else ()
    return bool(FEATURE_TERMS & {*learned, *watched})


class Objective:
    """The student's loss on a batch.

    Args:
        teacher: with the student's graph, apart from quantizers.
        student: already where it is computed.
        settings: of the recipe.
        context: device, precision, compilation.

    Attributes:
        names: of the terms that have a weight.
    """

    def __init__(
        self, teacher: Teacher, student: Student, settings: Finetuning, context: Context
    ) -> None:
        policy = context.policy
        self.settings, self.policy = settings, policy
        self.weights = {name: w for name, w in settings.losses.model_dump().items() if w}
        self.names = list(self.weights)
        network = prepared_network(teacher, student.recipe)
        self.blocks = aligned_blocks(network, student.info) if _compares_features(settings) else {}
        self.student = tap_nodes(student.network, self.blocks)
        self.teacher = policy.place(tap_nodes(network, self.blocks)).requires_grad_(False)
        # on a CPU a compiled student is no faster: convolutions and batch norms are its whole time
        worth = policy.device.type == "cuda" and policy.worth_compiling(settings.steps)
        # two passes before a step add up one gradient, and a CUDA graph writes its own over the last one's
        graphs = settings.promotion is None
        self._compiled = policy.compiled(
            self._terms, enabled=worth, note=context.reporter.note, graphs=graphs
        )

    def lesson(self, batch: Batch, *, differentiable: bool = False) -> Lesson:
        """Ask the teacher about a batch, unless its source did and nothing else is needed.

        Args:
            batch: the images.
            differentiable: let gradients pass from the lesson to the images.
        """
        if batch.logits is not None and not self.blocks and not differentiable:
            return Lesson(batch.logits, batch.targets)
        watched = contextlib.nullcontext() if differentiable else torch.no_grad()
        with watched, self.policy.autocast():
            logits, *features = self.teacher(batch.images)
        return Lesson(logits.float(), batch.targets, self._channels_first(features))

    def __call__(self, images: Tensor, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its weighted terms; one pass of the student."""
        terms = self._compiled(images, lesson.logits, lesson.targets, *lesson.features)
        return torch.stack(terms).sum(), dict(zip(self.names, terms, strict=True))

    def separate(self, images: Tensor, lesson: Lesson, names: Sequence[str]) -> dict[str, Tensor]:
        """Return terms by name, unweighted, whether the student learns from them or not."""
        with self.policy.autocast():
            outputs, *ours = self.student(images)
        features = self._channels_first(ours)
        return {name: TERMS[name](outputs, features, lesson, self.settings) for name in names}

    def _channels_first(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return block outputs as (N, C, H, W), wherever a network has their channels."""
        axes = self.blocks.values()
        return tuple(x.movedim(axis, 1) for x, axis in zip(features, axes, strict=True))

    def _terms(
        self, images: Tensor, logits: Tensor, targets: Tensor, *features: Tensor
    ) -> list[Tensor]:
        terms = self.separate(images, Lesson(logits, targets, features), self.names)
        return [w * terms[name] for name, w in self.weights.items()]
