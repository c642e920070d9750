# SPDX-License-Identifier: Apache-2.0
"""The published synthesis loops, written plainly: a yardstick for `zsq bench`, used nowhere else.

Eager float32 in PyTorch's default memory format, a teacher that gathers gradients nobody reads,
optimisers and schedulers off the shelf, the loss read in every step because the scheduler asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from zsq.bench.loops import Step
from zsq.config import GenieSynthesis, PixelSynthesis
from zsq.functional.shift import random_offsets
from zsq.synthesis.generator import Generator
from zsq.synthesis.objective import count_classes
from zsq.teacher.taps import strided_nodes, tap_batch_norms
from zsq.teacher.teacher import Teacher


def plain_genie(teacher: Teacher, settings: GenieSynthesis, device: torch.device) -> Step:
    """Return the step of GENIE-D on one batch (arXiv 2212.04780, section 4.1)."""
    shifts = len(strided_nodes(teacher.network)) if settings.swing else 0
    tapped, targets = tap_batch_norms(teacher.network, swing=shifts > 0)
    tapped = tapped.to(device).requires_grad_(True)
    generator = Generator(settings.latent, teacher.info.input_shape).to(device)
    latents = torch.randn(settings.batch, settings.latent, device=device).requires_grad_()
    stored = [(target.mean.to(device), target.std.to(device)) for target in targets]
    optimizers = [
        torch.optim.Adam([latents], lr=settings.latent_lr),
        torch.optim.Adam(generator.parameters(), lr=settings.generator_lr),
    ]
    plateau = ReduceLROnPlateau(optimizers[0], patience=settings.plateau_patience)

    def step() -> float:
        images = generator(latents)
        inputs = tapped(images, random_offsets(shifts, device)) if shifts else tapped(images)
        loss = _image_statistics(images)
        for x, (mean, std) in zip(inputs, stored, strict=True):
            loss = loss + functional.mse_loss(x.mean((0, 2, 3)), mean)
            loss = loss + functional.mse_loss(x.var((0, 2, 3)).add(1e-10).sqrt(), std)
        return _descend(loss, optimizers, plateau, tapped)

    return step


def _descend(
    loss: Tensor, optimizers: Sequence[torch.optim.Optimizer], plateau: ReduceLROnPlateau,
    teacher: nn.Module,
) -> float:  # fmt: skip
    """Make an optimiser's step as published: the teacher's gradients, too, and the loss read back."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    value = loss.item()
    plateau.step(value)
    teacher.zero_grad()
    return value


def _image_statistics(images: Tensor) -> Tensor:
    mean, std = images.mean((2, 3)), images.var((2, 3)).add(1e-10).sqrt()
    return (mean**2 + (std - 1) ** 2).sum(1).mean()


def plain_pixels(teacher: Teacher, settings: PixelSynthesis, device: torch.device) -> Step:
    """Return the step of HAST's synthesis on one batch (arXiv 2303.13826, section 3.2)."""
    tapped, targets = tap_batch_norms(teacher.network, logits=True)
    tapped = tapped.to(device).requires_grad_(True)
    pixels = torch.randn(settings.batch, *teacher.info.input_shape, device=device).requires_grad_()
    labels = torch.randint(count_classes(teacher), (settings.batch,), device=device)
    optimizer = torch.optim.Adam([pixels], lr=settings.lr)
    plateau = ReduceLROnPlateau(optimizer, patience=settings.plateau_patience)
    stored = [(target.mean.to(device), target.variance.to(device)) for target in targets]
    weights = settings.losses

    def step() -> float:
        logits, inputs = tapped(pixels)
        distance = torch.zeros((), device=device)
        for x, (mean, variance) in zip(inputs, stored, strict=True):
            distance = distance + functional.mse_loss(x.mean((0, 2, 3)), mean)
            distance = distance + functional.mse_loss(x.var((0, 2, 3), unbiased=False), variance)
        entropy = functional.cross_entropy(logits, labels, reduction="none")
        difficulty = (1 - torch.exp(-entropy)).clamp(min=1e-6) ** settings.difficulty
        loss = weights.batch_statistics * distance / len(stored)
        loss = loss + weights.cross_entropy * (difficulty * entropy).mean()
        return _descend(loss, [optimizer], plateau, tapped)

    return step
