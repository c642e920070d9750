# SPDX-License-Identifier: Apache-2.0
"""GENIE-D: images from the statistics that batch norms remember (arXiv 2212.04780, section 4.1).

Every image owns a latent vector, a batch of images shares a small generator, and both learn until
the batch, sent through the frozen teacher, has the mean and standard deviation that each batch norm
saw in training. Strided convolutions see their input shifted at random (swing convolution), so that
all pixels take part. Batches are independent: several can be in flight side by side, each with a
generator, statistics, rates and chance of its own.

The published command line swaps its two learning rates where it uses them; `latent_lr` and
`generator_lr` are what is executed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsq.config import GenieSynthesis
from zsq.errors import RunError
from zsq.functional.shift import random_offsets
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.runtime.tasks import Task
from zsq.synthesis.batches import batch_sizes, side_by_side
from zsq.synthesis.dealing import dealt
from zsq.synthesis.filling import batches_at_a_time
from zsq.synthesis.genie_loss import Loss, Objective, loss_function, make_objective
from zsq.synthesis.images import ImageSet, predict
from zsq.synthesis.plateau import Plateau
from zsq.teacher.taps import strided_nodes
from zsq.teacher.teacher import Teacher

#: Steps between two records of the loss, and between two looks for NaN.
RECORD_EVERY = 50


def synthesize_genie(teacher: Teacher, settings: GenieSynthesis, context: Context) -> ImageSet:
    """Make images from a teacher's batch norm statistics with GENIE-D.

    Args:
        teacher: must have batch norms with running statistics.
        settings: of the recipe.
        context: finished rounds of batches are taken from, and kept in, its checkpoints; rounds are
            dealt out to the processes of its group.

    Returns:
        ``settings.images`` images; labels are the teacher's predictions.

    Raises:
        UsageError: no batch norm has running statistics.
        RunError: the loss became NaN.
    """
    shifts = len(strided_nodes(teacher.network)) if settings.swing else 0
    sizes = batch_sizes(settings.images, settings.batch)
    parallel = batches_at_a_time(settings.parallel, sizes, teacher, context)
    settings = settings.model_copy(update={"parallel": parallel})
    rounds = side_by_side(sizes, parallel)
    widest = max(len(each) for each in rounds)
    objective = make_objective(
        teacher, settings.latent, widest, swing=shifts > 0, context=context
    )  # fmt: skip
    worth = context.policy.worth_compiling(settings.steps * len(rounds))
    loss = loss_function(objective, max(sizes), settings.latent, shifts, compile=worth)

    def make(index: int) -> dict[str, Tensor]:
        first, count = sum(len(each) for each in rounds[:index]), len(rounds[index])
        which = f"batch {first + 1}" if count == 1 else f"batches {first + 1} to {first + count}"
        title = f"synthesis, {which} of {len(sizes)}"
        with context.reporter.task(title, settings.steps) as task:
            return _Round(objective, loss, settings, rounds[index], shifts, first).run(task)

    made = list(dealt(len(rounds), make, context))
    losses = torch.cat([piece["loss"].reshape(-1) for piece in made]).tolist()
    images = torch.cat([piece["images"] for piece in made])
    provenance: dict[str, object] = {
        "method": "genie", "settings": settings.model_dump(mode="json"), "seed": context.seed,
        "model": teacher.info.reference, "batch_losses": losses, "synthetic": True,
    }  # fmt: skip
    return ImageSet(images, predict(teacher, images, context), provenance)


class _Round:
    """Batches that are made side by side.

    Args:
        objective: makes their images; its generators start afresh.
        loss_function: the objective's, perhaps compiled.
        settings: of the recipe.
        sizes: images per batch, all equal.
        shifts: of swing convolutions; 0 for none.
        first: index of the first batch.
    """

    def __init__(
        self, objective: Objective, loss_function: Loss, settings: GenieSynthesis,
        sizes: tuple[int, ...], shifts: int, first: int,
    ) -> None:  # fmt: skip
        self.objective, self.loss_function, self.settings = objective, loss_function, settings
        self.context, self.first = objective.context, first
        device = self.context.policy.device
        self.latents: list[Tensor] = []
        drawn: list[Tensor] = []
        for index, (size, generator) in enumerate(zip(sizes, objective.generators, strict=False)):
            with seeded(self.context.seed, "synthesis", first + index):
                generator.reset_parameters()
                z = torch.randn(size, settings.latent).to(device)
                self.latents.append(z.requires_grad_())
                # of all steps at once: what a batch draws does not depend on those beside it
                offsets = random_offsets(settings.steps * shifts, device)
                drawn.append(offsets.reshape(settings.steps, shifts, 2))
        self.offsets = torch.stack(drawn, dim=2) if shifts else None
        self.rates = [torch.tensor(settings.latent_lr, device=device) for _ in sizes]
        self.generator_rate = torch.tensor(settings.generator_lr, device=device)
        own = [{"params": [z], "lr": r} for z, r in zip(self.latents, self.rates, strict=True)]
        weights = [p for g in objective.generators[: len(sizes)] for p in g.parameters()]
        self.optimizers = [
            torch.optim.Adam(own, fused=True),
            torch.optim.Adam(weights, lr=self.generator_rate, fused=True),
        ]
        self.plateaus = [Plateau(rate, settings.plateau_patience) for rate in self.rates]

    def run(self, task: Task) -> dict[str, Tensor]:
        """Optimise; return the images and each batch's last loss."""
        losses, kept = torch.zeros(len(self.latents)), torch.empty(0)
        for step in range(self.settings.steps):
            last = step == self.settings.steps - 1
            if last:  # the images that are kept are those of the last pass, before its update
                kept = self._images()
            losses = self._step(None if self.offsets is None else self.offsets[step])
            if (step + 1) % self.settings.decay_every == 0:
                self.generator_rate.mul_(self.settings.generator_decay)
            if step % RECORD_EVERY == 0 or last:
                self._record(losses, step)
            task.advance(1, loss=losses.mean())
        return {"images": kept.float().cpu().contiguous(), "loss": losses.cpu()}

    @torch.no_grad()
    def _images(self) -> Tensor:
        return torch.cat([self.objective.images(z, i) for i, z in enumerate(self.latents)])

    def _step(self, offsets: Tensor | None) -> Tensor:
        """Make one step with every batch; return their losses."""
        losses = self.loss_function(self.latents, offsets)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        losses = losses.detach()
        for plateau, loss in zip(self.plateaus, losses, strict=True):
            plateau.step(loss)
        return losses

    def _record(self, losses: Tensor, step: int) -> None:
        for batch, value in enumerate(losses.tolist(), self.first):
            at = batch * self.settings.steps + step
            if not math.isfinite(value):
                raise RunError(
                    f"the synthesis loss became {value} at or before step {at}. Lower "
                    "synthesis.latent_lr or synthesis.generator_lr with --set, or try "
                    "--precision fp32."
                )
            self.context.record("synthesis", at, loss=value, batch=batch)
