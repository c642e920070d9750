# SPDX-License-Identifier: Apache-2.0
"""The published tuning loops, written plainly: a yardstick for `zsq bench`, used nowhere else.

Eager float32 in PyTorch's default memory format, optimisers off the shelf, a teacher that gathers
gradients nobody reads, inundation's search as published (doubling and bisection, one read of the
device a trial). The quantizers are the package's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from zsq.bench.loops import Step
from zsq.config import Finetuning, GeneratorSynthesis, Recipe, Reconstruction
from zsq.functional.losses import kl_divergence
from zsq.quantizers.minmax import MinMaxWeight, TrackedActivation
from zsq.quantizers.weight import SoftRoundWeight
from zsq.runtime.context import Context
from zsq.runtime.policy import Policy
from zsq.student import Student, attach
from zsq.synthesis.generators import build_generator
from zsq.synthesis.labels import plain_labels
from zsq.synthesis.learner import BETAS
from zsq.synthesis.objective import count_classes
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import Teacher
from zsq.tuning.inundation import InundatedSGD
from zsq.tuning.pieces import Piece, quantizer_modules
from zsq.tuning.tuner import Problem

#: Exponent of the rounding regulariser in the middle of its schedule.
BETA = 11.0


def plain_reconstruction(
    piece: Piece, problem: Problem, settings: Reconstruction, device: torch.device
) -> Step:
    """Return the step of GENIE-M on a block (arXiv 2212.04780, section 4.2)."""
    block = _default_format(copy.deepcopy(piece.student)).to(device)
    theirs, ours, target = (
        x.to(device).contiguous()
        for x in (problem.from_teacher, problem.from_student, problem.target)
    )
    weights = [m for m in block.modules() if isinstance(m, SoftRoundWeight)]
    quantizers = quantizer_modules(dataclasses.replace(piece, student=block)).values()
    block.requires_grad_(False)
    learned: list[tuple[list[nn.Parameter], float]] = [
        ([w.rounding for w in weights], settings.rounding_lr or 1e-3),
        ([w.raw_scale for w in weights], settings.scale_lr),
        ([q.raw_scale for q in quantizers], settings.activation_lr),
    ]
    for tensor in (tensor for group, _ in learned for tensor in group):
        tensor.requires_grad_(True)
    optimizers = [torch.optim.Adam(group, lr=rate) for group, rate in learned if group]

    def step() -> Tensor:
        chosen = torch.randperm(len(target))[: settings.batch].to(device)
        inputs = theirs[chosen]
        inputs = torch.where(torch.rand_like(inputs) < settings.mix, ours[chosen], inputs)
        loss = (block(inputs) - target[chosen]).pow(2).sum(1).mean()
        for weight in weights:
            undecided = 1 - (2 * weight.used_bits - 1).abs().pow(BETA)
            loss = loss + settings.rounding_weight * undecided.sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()  # type: ignore[no-any-return]

    return step


def plain_finetuning(teacher: Teacher, recipe: Recipe, device: torch.device) -> Step:
    """Return the step of AIT on GDFQ (arXiv 2203.17008, 2003.03603), inundation included."""
    synthesis, tuning = recipe.synthesis, recipe.tuning
    assert isinstance(synthesis, GeneratorSynthesis)
    assert isinstance(tuning, Finetuning)
    learn_generator = _generator_step(teacher, synthesis, device)
    student = attach(teacher, recipe)
    _default_format(student.network).to(device)
    _set_ranges(student, learn_generator()[0])
    weights = {
        path: layer.weight
        for path, layer in student.layers().items()
        if isinstance(layer.weight, MinMaxWeight)
    }
    rest = _rest(student, weights)
    rule = InundatedSGD(
        weights, momentum=tuning.momentum, weight_decay=tuning.weight_decay, grid="moving",
        guarantee=False,
    )  # fmt: skip
    others = torch.optim.SGD(
        rest, lr=tuning.lr, momentum=tuning.momentum, nesterov=tuning.momentum > 0,
        weight_decay=tuning.weight_decay,
    )  # fmt: skip

    def step() -> Tensor:
        images, logits = learn_generator()
        loss = tuning.losses.kl * kl_divergence(
            student(images), logits, tuning.temperature, tuning.kl_mean
        )
        others.zero_grad()
        rule.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        others.step()
        rule.step(tuning.lr, target=tuning.inundation.target if tuning.inundation else 0.0)
        return loss.detach()

    return step


def _generator_step(
    teacher: Teacher, settings: GeneratorSynthesis, device: torch.device
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return GDFQ's generator step, which gives the images it made and the teacher's logits."""
    classes = count_classes(teacher)
    context = Context(policy=Policy(device))
    generator = build_generator(teacher, settings, classes, context).to(device)
    tapped, targets = tap_batch_norms(teacher.network, logits=True)
    tapped = tapped.to(device).requires_grad_(True)
    stored = [(target.mean.to(device), target.variance.to(device)) for target in targets]
    optimizer = torch.optim.Adam(generator.parameters(), lr=settings.lr, betas=BETAS)

    def step() -> tuple[Tensor, Tensor]:
        labels = plain_labels(settings.batch, classes, device)
        noise = generator.draw_noise(labels)  # type: ignore[operator]
        images = generator(noise, labels.classes, labels.weights)
        logits, inputs = tapped(images)
        distance = torch.zeros((), device=device)
        for x, (mean, variance) in zip(inputs, stored, strict=True):
            distance = distance + functional.mse_loss(x.mean((0, 2, 3)), mean)
            distance = distance + functional.mse_loss(x.var((0, 2, 3), unbiased=False), variance)
        loss = functional.cross_entropy(logits, labels.classes[:, 0])
        loss = loss + settings.statistics_weight * distance / len(stored)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tapped.zero_grad()
        return images.detach(), logits.detach()

    return step


def _rest(student: Student, weights: dict[str, MinMaxWeight]) -> list[Tensor]:
    """Return what learns besides the quantized weights: biases, gamma and beta."""
    student.network.requires_grad_(True)
    for quantizer in student.quantizers().values():
        quantizer.requires_grad_(False)
    masters = {id(weight.master) for weight in weights.values()}
    learned = (p for p in student.network.parameters() if p.requires_grad)
    return [p for p in learned if id(p) not in masters]


@torch.no_grad()
def _set_ranges(student: Student, images: Tensor) -> None:
    """Let one batch set the ranges of activations."""
    for tracking in (True, False):
        for quantizer in student.quantizers().values():
            assert isinstance(quantizer, TrackedActivation)
            quantizer.enabled, quantizer.tracking = True, tracking
        student(images)


def _default_format(network: GraphModule) -> GraphModule:
    """Lay weights out as PyTorch does by default."""
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]
