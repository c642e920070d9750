# SPDX-License-Identifier: Apache-2.0
"""GENIE-D's loss, of one batch or of several side by side, whole or in slices of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zsq.functional.statistics import (
    batch_norm_loss,
    batch_norm_loss_of_sums,
    centered_sums,
    image_loss,
)
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.runtime.shelf import room_for_work
from zsq.synthesis.generator import Generator
from zsq.synthesis.slicing import AT_WORK, kept_per_image, slice_size, sliced_loss
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import Teacher

Loss = Callable[[Sequence[Tensor], Tensor | None], Tensor]
"""latents of each batch, (N, latent), and offsets, (shifts, batches, 2) -> each batch's loss, (batches,)"""


@dataclass
class Objective:
    """The losses of batches of latents, as one function of tensors that a compiler can take whole.

    Attributes:
        generators: one for each batch side by side.
        tapped: the teacher, which sees all of them in one pass.
        means: stored, of its batch norms.
        stds: stored.
        context: how to compute.
    """

    generators: list[Generator]
    tapped: nn.Module
    means: list[Tensor]
    stds: list[Tensor]
    context: Context

    def __call__(self, latents: Sequence[Tensor], offsets: Tensor | None) -> Tensor:
        """Return each batch's loss."""
        made = [self.images(z, index) for index, z in enumerate(latents)]
        inputs = self.inputs(made[0] if len(made) == 1 else torch.cat(made), offsets)
        own = zip(*(x.chunk(len(made)) for x in inputs), strict=True)
        distances = [batch_norm_loss(each, self.means, self.stds) for each in own]
        return torch.stack([a + image_loss(b) for a, b in zip(distances, made, strict=True)])

    def inputs(self, images: Tensor, offsets: Tensor | None) -> list[Tensor]:
        """Return what the teacher's batch norms are given."""
        with self.context.policy.autocast():
            return self.tapped(images) if offsets is None else self.tapped(images, offsets)  # type: ignore[no-any-return]

    def sums(self, images: Tensor, offsets: Tensor | None) -> list[Tensor]:
        """Return, per batch norm, what batch statistics are made of, (2, C): sums add up over parts."""
        inputs = self.inputs(images, offsets)
        return [
            torch.stack(centered_sums(x, mean)) for x, mean in zip(inputs, self.means, strict=True)
        ]

    def of_sums(self, sums: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Return the distance of a batch's statistics from the stored ones."""
        return batch_norm_loss_of_sums(sums, counts, self.means, self.stds)

    def images(self, z: Tensor, index: int) -> Tensor:
        """Return what one of the generators makes of its batch's latents."""
        with self.context.policy.autocast():
            images: Tensor = self.generators[index](z)
        return images


def make_objective(
    teacher: Teacher, latent: int, parallel: int, *, swing: bool, context: Context
) -> Objective:
    """Build the objective of ``parallel`` batches side by side.

    Raises:
        UsageError: no batch norm has running statistics.
    """
    policy = context.policy
    tapped, targets = tap_batch_norms(teacher.network, swing=swing)
    shape = teacher.info.input_shape
    # every batch draws weights of its own for them; these are not to come from the caller's chance
    with seeded(context.seed, "generators"):
        generators = [policy.place(Generator(latent, shape)) for _ in range(parallel)]
    return Objective(
        generators,
        policy.place(tapped),
        [target.mean.to(policy.device) for target in targets],
        [target.std.to(policy.device) for target in targets],
        context,
    )


def loss_function(
    objective: Objective, batch: int, latent: int, shifts: int, *, compile: bool
) -> Loss:
    """Return the loss, compiled; with the teacher in slices where all batches do not fit the memory.

    Args:
        objective: of as many batches as will be side by side.
        batch: images in each of them.
        latent: length of a latent vector.
        shifts: of swing convolutions; 0 for none.
        compile: whether that repays.
    """
    policy, note = objective.context.policy, objective.context.reporter.note
    parallel = len(objective.generators)
    z, offsets = torch.zeros(4, latent, device=policy.device), None
    if shifts:
        offsets = torch.ones(shifts, 1, 2, dtype=torch.long, device=policy.device)
    fixed, per_image = _memory_needed(objective, z, offsets, batch)
    room = room_for_work(policy)
    size = slice_size(batch * parallel, fixed * parallel, per_image, room)
    if size >= batch * parallel:
        return policy.compiled(objective, enabled=compile, note=note)
    size = min(size, batch)
    note(
        f"synthesis: batches of {batch} images go through the teacher {size} at a time, to fit the "
        "memory (--memory); same statistics, somewhat slower steps"
    )
    sums = policy.compiled(objective.sums, enabled=compile, note=note)
    with torch.no_grad():
        places = [x[0, 0].numel() for x in objective.inputs(objective.images(z[:2], 0), offsets)]

    def loss(z: Tensor, index: int, offsets: Tensor | None) -> Tensor:
        images = objective.images(z, index)
        counts = [len(z) * count for count in places]
        weigh = partial(objective.of_sums, counts=counts)
        own = None if offsets is None else offsets[:, index : index + 1]
        return sliced_loss(images, own, sums, weigh, size) + image_loss(images)

    def losses(latents: Sequence[Tensor], offsets: Tensor | None) -> Tensor:
        return torch.stack([loss(z, index, offsets) for index, z in enumerate(latents)])

    return losses


def _memory_needed(
    objective: Objective, z: Tensor, offsets: Tensor | None, batch: int
) -> tuple[int, int]:
    """Return the bytes that a batch's images need, and those of one image in the teacher."""
    images = objective.images(z, 0).detach()
    generator = kept_per_image(lambda count: objective.images(z[:count].requires_grad_(), 0))
    teacher = kept_per_image(
        lambda count: objective.sums(images[:count].clone().requires_grad_(), offsets)
    )
    # with gradients and Adam's moments
    weights = 4 * sum(p.nbytes for p in objective.generators[0].parameters())
    return weights + int(AT_WORK * batch * generator), teacher
