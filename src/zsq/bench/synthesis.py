# SPDX-License-Identifier: Apache-2.0
"""The loops that make images, ready to be measured: GENIE-D, and pixels as HAST optimises them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zsq.bench.loops import Job, Part, Step
from zsq.bench.plain_synthesis import plain_genie, plain_pixels
from zsq.bench.turns import Tick, TickingReporter
from zsq.config import GenieSynthesis, MixedSynthesis, PixelSynthesis
from zsq.runtime.context import Context
from zsq.runtime.policy import Policy
from zsq.settings import Synthesis
from zsq.synthesis.generator import Generator
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.pixels import synthesize_pixels


def _synthesis(job: Job, recipe: str) -> Synthesis:
    """Return a recipe's settings for the batch and images asked for; by default one batch.

    Batches are made one after another: a step is one of one batch, as that of the bare passes beside it.
    """
    published = job.recipe(recipe, []).synthesis
    assert not isinstance(published, MixedSynthesis)
    batch = job.batch or published.batch
    images = job.images or batch
    changes = [
        f"synthesis.batch={min(batch, images)}",
        f"synthesis.images={images}",
        "synthesis.parallel=1",
    ]
    return job.recipe(recipe, changes).synthesis


def genie_loop(job: Job) -> Iterator[Part]:
    """Yield GENIE-D. Bare: the generator's passes, the frozen teacher's forward and input-backward."""
    settings = _synthesis(job, "genie")
    assert isinstance(settings, GenieSynthesis)

    def drive(tick: Tick) -> None:
        context = Context(policy=job.policy, reporter=TickingReporter(tick, job.note))
        synthesize_genie(job.teacher, settings, context)

    def bare(policy: Policy, images: int, compile: bool) -> Step:
        generator = policy.place(Generator(settings.latent, job.teacher.info.input_shape))
        latents = torch.randn(images, settings.latent, device=policy.device)
        passes = nn.Sequential(generator, job.network(policy))
        return passes_of(passes, latents, policy, compile, job)

    rounds = math.ceil(settings.images / settings.batch)
    yield Part(
        "genie", settings.batch, job.policy, job.policy.worth_compiling(settings.steps),
        settings.steps * rounds, drive, bare,
        lambda: plain_genie(job.teacher, settings, job.policy.device),
    )  # fmt: skip


def pixel_loop(job: Job) -> Iterator[Part]:
    """Yield pixel synthesis as HAST does it. Bare: the frozen teacher's forward and input-backward."""
    settings = _synthesis(job, "hast")
    assert isinstance(settings, PixelSynthesis)

    def drive(tick: Tick) -> None:
        context = Context(policy=job.policy, reporter=TickingReporter(tick, job.note))
        synthesize_pixels(job.teacher, settings, context)

    def bare(policy: Policy, images: int, compile: bool) -> Step:
        pixels = torch.randn(images, *job.teacher.info.input_shape, device=policy.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return passes_of(job.network(policy), pixels, policy, compile, job)

    rounds = math.ceil(settings.images / settings.batch)
    yield Part(
        "pixels", settings.batch, job.policy, job.policy.worth_compiling(settings.steps),
        settings.steps * rounds, drive, bare,
        lambda: plain_pixels(job.teacher, settings, job.policy.device),
    )  # fmt: skip


def passes_of(network: nn.Module, inputs: Tensor, policy: Policy, compile: bool, job: Job) -> Step:
    """Return the forward pass of a network and the backward pass to its inputs and free weights."""
    inputs.requires_grad_()
    forward = policy.compiled(network, enabled=compile, note=job.note)
    free = [inputs, *(p for p in network.parameters() if p.requires_grad)]

    def step() -> None:
        with policy.autocast():
            outputs = forward(inputs)
        outputs.float().square().mean().backward()
        for tensor in free:
            tensor.grad = None

    return step
