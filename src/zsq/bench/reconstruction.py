# SPDX-License-Identifier: Apache-2.0
"""GENIE-M's block reconstruction, ready to be measured block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.bench.loops import Job, Part, Step
from zsq.bench.plain_tuning import plain_reconstruction
from zsq.bench.turns import Tick
from zsq.config import Reconstruction
from zsq.runtime.context import Context
from zsq.runtime.policy import Policy
from zsq.student import attach, prepared_network
from zsq.tuning.compiling import PieceCompiler
from zsq.tuning.pieces import Piece, block_pieces
from zsq.tuning.reconstruct import run, values
from zsq.tuning.tuner import PieceTuner, Problem, piece_policy

#: Batches in the set that blocks are tuned on, where no number of images is asked for.
BATCHES = 2


def reconstruction_loop(job: Job) -> Iterator[Part]:
    """Yield each block at W4A4, on noise. Bare: forward and backward passes of the float block.

    The blocks before the one that is measured have made the steps that they were measured with.
    """
    changes = [] if job.batch is None else [f"tuning.batch={job.batch}"]
    recipe = job.recipe("genie", changes)
    settings = recipe.tuning
    assert isinstance(settings, Reconstruction)
    policy = job.policy
    context, compiler = Context(policy=policy), PieceCompiler(policy, job.note)
    student = attach(job.teacher, recipe)
    network = policy.place(prepared_network(job.teacher, recipe))
    policy.place(student.network)
    count = job.images or BATCHES * settings.batch
    ours = theirs = torch.randn(count, *job.teacher.info.input_shape)
    for piece in block_pieces(network, student):
        target = run(piece.teacher, theirs, context)
        if not piece.parts:
            problem = Problem(theirs, ours, target)
            yield _part(piece, problem, settings, context, compiler, job)
        for each in piece.parts:
            from_teacher = values(piece.teacher, theirs, each.source, context)
            from_student = values(piece.student, ours, each.source, context)
            problem = Problem(from_teacher, from_student, run(each.teacher, from_teacher, context))
            yield _part(each, problem, settings, context, compiler, job)
        theirs, ours = target, run(piece.student, ours, context)


def _part(
    piece: Piece,
    problem: Problem,
    settings: Reconstruction,
    context: Context,
    compiler: PieceCompiler,
    job: Job,
) -> Part:
    def drive(tick: Tick) -> None:
        tuner = PieceTuner(piece, problem, settings, context, compiler=compiler)
        tuner.calibrate()
        try:
            # the regulariser is off before; it is on in four fifths of a run
            for step in itertools.count(math.ceil(settings.warmup * settings.steps)):
                tuner.step(step)
                tick(1)
        finally:
            tuner.finish()

    def bare(policy: Policy, images: int, compile: bool) -> Step:
        inputs = problem.from_teacher[:images], problem.target[:images]
        return _passes(piece.teacher, *inputs, policy, compile, job)

    batch = min(settings.batch, len(problem.target))
    return Part(
        piece.name, batch, piece_policy(piece, context.policy),
        compiler.worth(settings.steps, batch, problem.target), settings.steps, drive, bare,
        lambda: plain_reconstruction(piece, problem, settings, context.policy.device),
    )  # fmt: skip


def _passes(
    block: GraphModule, inputs: Tensor, target: Tensor, policy: Policy, compile: bool, job: Job
) -> Step:
    """Return the passes of a float block whose weights learn."""
    block = policy.placed_copy(block).requires_grad_(True)
    inputs, target = (channels_last(x.to(policy.device)) for x in (inputs, target))
    forward = policy.compiled(block, enabled=compile, note=job.note)
    free = list(block.parameters())

    def step() -> None:
        with policy.autocast():
            outputs = forward(inputs)
        (outputs.float() - target).square().mean().backward()
        for tensor in free:
            tensor.grad = None

    return step


def channels_last(x: Tensor) -> Tensor:
    """Return images or feature maps with their channels last; other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
