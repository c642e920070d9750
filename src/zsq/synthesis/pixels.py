# SPDX-License-Identifier: Apache-2.0
"""Images made by optimising pixels: ZeroQ, IntraQ and HAST.

A batch of noise learns, under Adam, to look to the frozen teacher like data: like its batch norms'
statistics and, where a recipe asks for it, like a class. The methods (arXiv 2001.00281, 2111.09136,
2303.13826) are weights of the terms in `TERMS`, and whether random crops are looked at.

Batches are independent but for IntraQ's class centres, which come from the batches finished before.
Several can be in flight side by side; each keeps its own statistics, rate and stream of chance.
Several processes make several rounds at a time. Batches with class centres are made one after another
by one process, so that the images are the same whatever could be done at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.config import PixelSynthesis
from zsq.errors import UsageError
from zsq.functional.crop import crop, random_windows
from zsq.functional.noise import start_noise
from zsq.functional.pixel_loss import (
    batch_statistics_distance,
    class_band,
    difficulty_cross_entropy,
    image_statistics_distance,
    soft_target_error,
)
from zsq.runtime.context import Context
from zsq.runtime.policy import Compiled
from zsq.runtime.seeds import derive_seed
from zsq.runtime.tasks import Task
from zsq.runtime.terms import record_terms
from zsq.synthesis.batches import PASS, batch_sizes, side_by_side
from zsq.synthesis.centers import ClassCenters, pooled_width
from zsq.synthesis.dealing import dealt
from zsq.synthesis.filling import batches_at_a_time
from zsq.synthesis.images import ImageSet, predict
from zsq.synthesis.objective import count_classes
from zsq.synthesis.plateau import Plateau
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import Teacher

#: Steps between two records of the loss, and between two looks for NaN.
RECORD_EVERY = 50


@dataclass(frozen=True)
class Wishes:
    """What the images of one or more batches should show; fixed while they are made.

    Attributes:
        labels: (N,) int64.
        probability: (N,) wanted probability of the label.
        centers: (N, F) class centres in feature space; (N, 0) where no term needs them.
        known: (N,) bool, whether the class has a centre yet.
    """

    labels: Tensor
    probability: Tensor
    centers: Tensor
    known: Tensor


@dataclass(frozen=True)
class View:
    """What the teacher makes of the images, and what a term may look at besides.

    Attributes:
        images: (groups * N, C, H, W), as the teacher saw them.
        inputs: of its batch norms.
        means: stored, of its batch norms.
        variances: stored.
        logits: (groups * N, classes).
        features: (groups * N, F) pooled, or None where no term needs them.
        wishes: for these images.
        groups: batches side by side.
        settings: of the recipe.
    """

    images: Tensor
    inputs: list[Tensor]
    means: list[Tensor]
    variances: list[Tensor]
    logits: Tensor
    features: Tensor | None
    wishes: Wishes
    groups: int
    settings: PixelSynthesis


def _class_band(view: View) -> Tensor:
    assert view.features is not None
    wishes = view.wishes
    return class_band(
        view.features, wishes.centers, wishes.known, view.settings.band, view.groups
    )  # fmt: skip


#: The terms that pixels can be optimised for; each returns one loss per batch, (groups,).
TERMS: dict[str, Callable[[View], Tensor]] = {
    "image_statistics": lambda view: image_statistics_distance(
        view.images, view.inputs, view.means, view.variances, view.groups
    ),
    "batch_statistics": lambda view: batch_statistics_distance(
        view.inputs, view.means, view.variances, view.groups
    ),
    "cross_entropy": lambda view: difficulty_cross_entropy(
        view.logits, view.wishes.labels, view.settings.difficulty, view.groups
    ),
    "soft_target": lambda view: soft_target_error(
        view.logits, view.wishes.labels, view.wishes.probability, view.groups
    ),
    "class_band": _class_band,
}
#: Terms that ask for a class: where none has weight, images are labelled by the teacher.
LABEL_TERMS = ("cross_entropy", "soft_target", "class_band")


def loss_weights(settings: PixelSynthesis) -> dict[str, float]:
    """Return the weights of the terms that pixels are optimised for.

    Raises:
        UsageError: no term has a weight.
    """
    weights = {name: weight for name, weight in settings.losses.model_dump().items() if weight}
    if not weights:
        raise UsageError(
            f"synthesis.losses has no term with a weight; choose among {', '.join(TERMS)}, e.g. --set "
            "synthesis.losses.batch_statistics=1."
        )
    return weights


class _Objective:
    """The loss of batches of pixels, as one function of tensors that a compiler can take whole."""

    def __init__(self, teacher: Teacher, settings: PixelSynthesis, context: Context) -> None:
        policy = context.policy
        self.weights = loss_weights(settings)
        self.with_features = "class_band" in self.weights
        tapped, targets = tap_batch_norms(
            teacher.network, logits=True, features=self.with_features
        )  # fmt: skip
        self.tapped: GraphModule = policy.place(tapped)
        self.means = [target.mean.to(policy.device) for target in targets]
        self.variances = [target.variance.to(policy.device) for target in targets]
        self.settings, self.policy, self.shape = settings, policy, teacher.info.input_shape
        if self.with_features:
            self.width = pooled_width(teacher)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return logits, pooled features where they are needed, and batch norm inputs."""
        with self.policy.autocast():
            logits, *features, inputs = self.tapped(images)
        return logits.float(), features[0].float().flatten(1) if features else None, inputs

    def __call__(
        self, groups: Tensor, pixels: Tensor, windows: Tensor | None, labels: Tensor,
        probability: Tensor, centers: Tensor, known: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return each batch's loss and each batch's terms; ``groups`` has one entry a batch."""
        images = pixels if windows is None else crop(pixels, windows)
        logits, features, inputs = self.look(images)
        wishes = Wishes(labels, probability, centers, known)
        view = View(images, inputs, self.means, self.variances, logits, features, wishes,
                    len(groups), self.settings)  # fmt: skip
        terms = torch.stack([w * TERMS[name](view) for name, w in self.weights.items()])
        return terms.sum(0), terms


def synthesize_pixels(teacher: Teacher, settings: PixelSynthesis, context: Context) -> ImageSet:
    """Make images by optimising their pixels.

    Args:
        teacher: must have batch norms with running statistics.
        settings: of the recipe.
        context: finished batches are taken from, and kept in, its checkpoints; rounds are dealt
            out to the processes of its group.

    Returns:
        ``settings.images`` images. Labels are the classes asked for where a term asks for them,
        else the teacher's predictions.

    Raises:
        UsageError: no batch norm has running statistics, no term has weight, or a term needs
            pooled features that the network does not have.
        RunError: the loss became NaN.
    """
    objective = _Objective(teacher, settings, context)
    sizes = batch_sizes(settings.images, settings.batch)
    parallel = 1 if objective.with_features else settings.parallel
    parallel = batches_at_a_time(parallel, sizes, teacher, context)
    settings = settings.model_copy(update={"parallel": parallel})
    rounds = side_by_side(sizes, parallel)
    worth = context.policy.worth_compiling(settings.steps * len(rounds))
    loss_function = context.policy.compiled(objective, enabled=worth, note=context.reporter.note)
    classes = count_classes(teacher)
    centers = ClassCenters(classes, objective.width) if objective.with_features else None

    def make(index: int) -> dict[str, Tensor]:
        title = f"synthesis, round {index + 1} of {len(rounds)}"
        done = sum(len(sizes) for sizes in rounds[:index])
        with context.reporter.task(title, settings.steps) as task:
            maker = _Round(objective, loss_function, context, done, rounds[index], classes, centers)
            return maker.run(task, index * settings.steps)

    made = []
    for piece in dealt(len(rounds), make, context, in_order=centers is not None):
        if centers is not None:
            centers.add(_features(objective, piece["images"], context), piece["labels"])
        made.append(piece)
    images = torch.cat([piece["images"] for piece in made])
    asked = any(name in objective.weights for name in LABEL_TERMS)
    labels = torch.cat([p["labels"] for p in made]) if asked else predict(teacher, images, context)
    provenance: dict[str, object] = {
        "method": "pixels", "settings": settings.model_dump(mode="json"), "seed": context.seed,
        "model": teacher.info.reference, "synthetic": True,
        "batch_losses": torch.cat([piece["loss"] for piece in made]).tolist(),
    }  # fmt: skip
    return ImageSet(images, labels, provenance)


@torch.no_grad()
def _features(objective: _Objective, images: Tensor, context: Context) -> Tensor:
    device = context.policy.device
    parts = [objective.look(part.to(device))[1] for part in torch.split(images, PASS)]
    return torch.cat([part.cpu() for part in parts if part is not None])


class _Round:
    """Batches that are made side by side.

    Args:
        objective: gives their losses.
        loss_function: the objective, perhaps compiled.
        context: seed and device.
        first: index of the first batch.
        sizes: images per batch, all equal.
        classes: of the teacher.
        centers: of the classes, from the batches before; None where no term needs them.
    """

    def __init__(
        self, objective: _Objective, loss_function: Compiled, context: Context, first: int,
        sizes: tuple[int, ...], classes: int, centers: ClassCenters | None,
    ) -> None:  # fmt: skip
        self.objective, self.loss_function, self.context = objective, loss_function, context
        self.settings, self.device = objective.settings, context.policy.device
        self.size, self.count = sizes[0], len(sizes)
        self.streams = [
            torch.Generator().manual_seed(derive_seed(context.seed, "pixels", first + i))
            for i in range(self.count)
        ]
        self.pixels = [self._noise(stream) for stream in self.streams]
        drawn = [torch.randint(classes, (self.size,), generator=s) for s in self.streams]
        wanted = [self._probability(stream) for stream in self.streams]
        labels = torch.cat(drawn)
        near, known = centers.of(labels) if centers else (torch.zeros(len(labels), 0), labels < 0)
        self.wishes = [t.to(self.device) for t in (labels, torch.cat(wanted), near, known)]
        self.labels = labels
        self.rates = [torch.tensor(self.settings.lr, device=self.device) for _ in self.pixels]
        groups = [{"params": [p], "lr": r} for p, r in zip(self.pixels, self.rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.plateaus = [Plateau(rate, self.settings.plateau_patience) for rate in self.rates]

    def _noise(self, stream: torch.Generator) -> Tensor:
        shape = (self.size, *self.objective.shape)
        noise = start_noise(shape, self.settings.init_slope, stream) * self.settings.init_std
        return noise.to(self.device).contiguous(memory_format=torch.channels_last).requires_grad_()

    def _probability(self, stream: torch.Generator) -> Tensor:
        """Draw wanted probabilities: half of them 1, the others between the floor and 1."""
        soft, share = torch.rand(2, self.size, generator=stream)
        floor = self.settings.soft_floor
        return torch.where(soft < 0.5, floor + (1 - floor) * share, 1.0)

    def _windows(self) -> Tensor | None:
        """Draw what of each image this step looks at; a batch is cropped whole or not at all."""
        settings = self.settings.crop
        if settings is None:
            return None
        drawn = []
        for stream in self.streams:
            cropped = float(torch.rand((), generator=stream)) < settings.probability
            drawn.append(random_windows(self.size, settings.smallest, float(cropped), stream))
        return torch.cat(drawn).to(self.device, non_blocking=True)

    def run(self, task: Task, first_step: int) -> dict[str, Tensor]:
        """Optimise; return images, labels and each batch's last loss."""
        groups, losses = torch.empty(self.count), torch.zeros(self.count)
        for step in range(self.settings.steps):
            joined = self.pixels[0] if self.count == 1 else torch.cat(self.pixels)
            losses, terms = self.loss_function(groups, joined, self._windows(), *self.wishes)
            self.optimizer.zero_grad()
            losses.sum().backward()
            self.optimizer.step()
            losses = losses.detach()
            for plateau, loss in zip(self.plateaus, losses, strict=True):
                plateau.step(loss)
            if step % RECORD_EVERY == 0 or step == self.settings.steps - 1:
                shown = dict(zip(self.objective.weights, terms.detach().mean(1), strict=True))
                record_terms(self.context, "synthesis", first_step + step, shown)
            task.advance(1, loss=losses.mean())
        images = torch.cat([pixels.detach() for pixels in self.pixels]).cpu().contiguous()
        return {"images": images, "labels": self.labels, "loss": losses.cpu()}
