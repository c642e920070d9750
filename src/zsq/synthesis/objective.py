# SPDX-License-Identifier: Apache-2.0
"""What a conditional generator learns from: the class asked for and the batch norms' statistics."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from zsq.functional.generator_loss import soft_cross_entropy, variance_distance
from zsq.runtime.policy import Policy
from zsq.synthesis.generator import Pool, whole_batches
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import Teacher


@torch.no_grad()
def count_classes(teacher: Teacher) -> int:
    """Return the number of a teacher's logits."""
    return int(teacher(torch.zeros(1, *teacher.info.input_shape)).shape[1])


class GeneratorObjective:
    """The generator's loss as one function of tensors that a compiler can take whole.

    Args:
        teacher: must have batch norms with running statistics.
        generator: on the policy's device.
        weight: of the batch norm distance beside the cross-entropy.
        policy: device and precision.
        pool: where a batch is a part of one that several processes share, makes its statistics those
            of the whole, in the generator's norms and in the distance alike.

    Raises:
        UsageError: no batch norm has running statistics.
    """

    def __init__(
        self, teacher: Teacher, generator: nn.Module, weight: float, policy: Policy,
        pool: Pool | None = None,
    ) -> None:  # fmt: skip
        tapped, targets = tap_batch_norms(teacher.network, logits=True)
        self.generator, self.tapped = generator, policy.place(tapped)
        self.means = [target.mean.to(policy.device) for target in targets]
        self.variances = [target.variance.to(policy.device) for target in targets]
        self.weight, self.policy, self.pool = weight, policy, pool

    def __call__(
        self, noise: Tensor, classes: Tensor, weights: Tensor, soft: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return loss, images, logits, cross-entropy and batch norm distance."""
        pooled = whole_batches(self.generator, self.pool) if self.pool else nullcontext()
        with self.policy.autocast(), pooled:
            images = self.generator(noise, classes, weights)
            logits, inputs = self.tapped(images)
        entropy = soft_cross_entropy(logits, soft)
        distance = variance_distance(inputs, self.means, self.variances, self.pool)
        return entropy + self.weight * distance, images, logits.float(), entropy, distance
