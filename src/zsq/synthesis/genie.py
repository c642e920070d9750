# SPDX-License-Identifier: Apache-2.0
"""GENIE-D: images from the statistics that batch norms remember (arXiv 2212.04780, section 4.1).

Every image owns a latent vector, a batch of images shares a small generator, and both learn until
the batch, sent through the frozen teacher, has the mean and standard deviation that each batch norm
saw in training. Strided convolutions see their input shifted at random (swing convolution), so that
all pixels take part. Batches are independent.

The published command line swaps its two learning rates where it uses them; `latent_lr` and
`generator_lr` are what is executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zsq.config import GenieSynthesis
from zsq.errors import RunError
from zsq.functional.shift import random_offsets
from zsq.functional.statistics import (
    batch_norm_loss,
    batch_norm_loss_of_sums,
    centered_sums,
    image_loss,
)
from zsq.runtime.context import Context
from zsq.runtime.policy import Compiled
from zsq.runtime.seeds import seeded
from zsq.runtime.shelf import room_for_work
from zsq.runtime.tasks import Task
from zsq.synthesis.batches import batch_sizes
from zsq.synthesis.dealing import dealt
from zsq.synthesis.generator import Generator
from zsq.synthesis.images import ImageSet, predict
from zsq.synthesis.plateau import Plateau
from zsq.synthesis.slicing import AT_WORK, kept_bytes, slice_size, sliced_loss
from zsq.teacher.taps import strided_nodes, tap_batch_norms
from zsq.teacher.teacher import Teacher

#: Steps between two records of the loss, and between two looks for NaN.
RECORD_EVERY = 50


@dataclass
class _Objective:
    """The loss of a batch of latents, as one function of tensors that a compiler can take whole."""

    generator: Generator
    tapped: nn.Module
    means: list[Tensor]
    stds: list[Tensor]
    context: Context

    def __call__(self, z: Tensor, offsets: Tensor | None) -> Tensor:
        images = self.images(z)
        inputs = self.inputs(images, offsets)
        return batch_norm_loss(inputs, self.means, self.stds) + image_loss(images)

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

    def images(self, z: Tensor) -> Tensor:
        with self.context.policy.autocast():
            images: Tensor = self.generator(z)
        return images


def _objective(
    teacher: Teacher, settings: GenieSynthesis, shifts: int, context: Context
) -> _Objective:
    policy = context.policy
    tapped, targets = tap_batch_norms(teacher.network, swing=shifts > 0)
    return _Objective(
        policy.place(Generator(settings.latent, teacher.info.input_shape)),
        policy.place(tapped),
        [target.mean.to(policy.device) for target in targets],
        [target.std.to(policy.device) for target in targets],
        context,
    )


def synthesize_genie(teacher: Teacher, settings: GenieSynthesis, context: Context) -> ImageSet:
    """Make images from a teacher's batch norm statistics with GENIE-D.

    Args:
        teacher: must have batch norms with running statistics.
        settings: of the recipe.
        context: finished batches are taken from, and kept in, its checkpoints; batches are dealt
            out to the processes of its group.

    Returns:
        ``settings.images`` images; labels are the teacher's predictions.

    Raises:
        UsageError: no batch norm has running statistics.
        RunError: the loss became NaN.
    """
    shifts = len(strided_nodes(teacher.network)) if settings.swing else 0
    objective = _objective(teacher, settings, shifts, context)
    sizes = batch_sizes(settings.images, settings.batch)
    worth = context.policy.worth_compiling(settings.steps * len(sizes))
    loss_function = _loss_function(objective, max(sizes), shifts, settings.latent, worth)

    def make(index: int) -> dict[str, Tensor]:
        title = f"synthesis, batch {index + 1} of {len(sizes)}"
        with (
            seeded(context.seed, "synthesis", index),
            context.reporter.task(title, settings.steps) as task,
        ):
            return _one_batch(objective, loss_function, settings, sizes[index], shifts, index, task)

    made = list(dealt(len(sizes), make, context))
    losses = [float(piece["loss"]) for piece in made]
    images = torch.cat([piece["images"] for piece in made])
    provenance: dict[str, object] = {
        "method": "genie", "settings": settings.model_dump(mode="json"), "seed": context.seed,
        "model": teacher.info.reference, "batch_losses": losses, "synthetic": True,
    }  # fmt: skip
    return ImageSet(images, predict(teacher, images, context), provenance)


Loss = Callable[[Tensor, Tensor | None], Tensor]
"""latents and offsets -> loss"""


def _loss_function(
    objective: _Objective, batch: int, shifts: int, latent: int, compile: bool
) -> Loss:
    """Return the loss, compiled; with the teacher in slices where a batch does not fit the memory."""
    policy, note = objective.context.policy, objective.context.reporter.note
    device = policy.device
    z, offsets = torch.zeros(4, latent, device=device), None
    if shifts:
        offsets = torch.ones(shifts, 2, dtype=torch.long, device=device)
    size = slice_size(batch, *_memory_needed(objective, z, offsets, batch), room_for_work(policy))
    if size >= batch:
        return Compiled(objective, enabled=compile, note=note)
    note(
        f"synthesis: batches of {batch} images go through the teacher {size} at a time, to fit the "
        "memory (--memory); same statistics, somewhat slower steps"
    )
    sums = Compiled(objective.sums, enabled=compile, note=note)
    with torch.no_grad():
        places = [x[0, 0].numel() for x in objective.inputs(objective.images(z[:2]), offsets)]

    def loss(z: Tensor, offsets: Tensor | None) -> Tensor:
        images = objective.images(z)
        counts = [len(z) * count for count in places]
        weigh = partial(objective.of_sums, counts=counts)
        return sliced_loss(images, offsets, sums, weigh, size) + image_loss(images)

    return loss


def _memory_needed(
    objective: _Objective, z: Tensor, offsets: Tensor | None, batch: int
) -> tuple[int, int]:
    """Return the bytes that a batch's images need, and those of one image in the teacher."""

    def made(count: int) -> int:
        return kept_bytes(lambda: objective.images(z[:count].requires_grad_()))

    def seen(count: int) -> int:
        images = objective.images(z[:count]).detach().requires_grad_()
        return kept_bytes(lambda: objective.sums(images, offsets))

    generator = (made(4) - made(2)) // 2
    weights = 4 * sum(
        p.nbytes for p in objective.generator.parameters()
    )  # gradients, Adam's moments
    return weights + int(AT_WORK * batch * generator), (seen(4) - seen(2)) // 2


def _one_batch(
    objective: _Objective, loss_function: Loss, settings: GenieSynthesis, size: int, shifts: int,
    index: int, task: Task,
) -> dict[str, Tensor]:  # fmt: skip
    context, device = objective.context, objective.context.policy.device
    objective.generator.reset_parameters()
    z = torch.randn(size, settings.latent).to(device).requires_grad_()
    latent_rate = torch.tensor(settings.latent_lr, device=device)
    generator_rate = torch.tensor(settings.generator_lr, device=device)
    optimizers = [
        torch.optim.Adam([z], lr=latent_rate, fused=True),
        torch.optim.Adam(objective.generator.parameters(), lr=generator_rate, fused=True),
    ]
    plateau = Plateau(latent_rate, settings.plateau_patience)
    loss, kept = torch.zeros(()), z.detach()
    for step in range(settings.steps):
        offsets = random_offsets(shifts, device) if shifts else None
        last = step == settings.steps - 1
        if last:  # the images that are kept are those of the last forward pass, before its update
            with torch.no_grad():
                kept = objective.images(z)
        loss = loss_function(z, offsets)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        plateau.step(loss.detach())
        if (step + 1) % settings.decay_every == 0:
            generator_rate.mul_(settings.generator_decay)
        if step % RECORD_EVERY == 0 or last:
            _record(context, loss.detach(), index * settings.steps + step, index)
        task.advance(1, loss=loss.detach())
    return {"images": kept.float().cpu().contiguous(), "loss": loss.detach().cpu()}


def _record(context: Context, loss: Tensor, step: int, index: int) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise RunError(
            f"the synthesis loss became {value} at or before step {step}. Lower synthesis.latent_lr or "
            "synthesis.generator_lr with --set, or try --precision fp32."
        )
    context.record("synthesis", step, loss=value, batch=index)
