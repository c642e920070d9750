# SPDX-License-Identifier: Apache-2.0
"""Time of a synthesis step and of a reconstruction step, beside the bare network's.

Nothing else should run meanwhile.

    python benchmarks/speed.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.config import GenieSynthesis, load_recipe
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.student import attach, prepared_network
from zsq.synthesis.genie import synthesize_genie
from zsq.teacher.teacher import Teacher, load_teacher
from zsq.tuning.pieces import block_pieces
from zsq.tuning.reconstruct import run
from zsq.tuning.tuner import PieceTuner, Problem


def milliseconds(function: Callable[[], object], repeats: int = 30) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def synthesis(teacher: Teacher) -> None:
    """Print the time of one step at batch 128, compilation and all fixed costs taken out."""
    policy = make_policy()
    seconds = []
    for steps in (300, 600):
        start = time.perf_counter()
        synthesize_genie(teacher, GenieSynthesis(images=128, steps=steps), Context(policy=policy))
        seconds.append(time.perf_counter() - start)
    step = 1000 * (seconds[1] - seconds[0]) / 300
    print(f"synthesis, batch 128: {step:.0f} ms a step; 500 steps in "
          f"{seconds[0] + 0.2 * step:.0f} s with compilation")  # fmt: skip


def reconstruction(teacher: Teacher) -> None:
    """Print the time of a step of every block at batch 32 and of its bare forward and backward."""
    recipe = load_recipe("genie", bits="w4a4", settings=["tuning.steps=500"])
    student, context = attach(teacher, recipe), Context(policy=make_policy())
    network = context.policy.place(prepared_network(teacher, recipe))
    context.policy.place(student.network)
    ours = theirs = torch.randn(128, *teacher.info.input_shape)
    steps, bares = [], []
    for piece in block_pieces(network, student):
        target = run(piece.teacher, theirs, context)
        tuner = PieceTuner(piece, Problem(theirs, ours, target), recipe.tuning, context)
        tuner.calibrate()
        count = iter(range(500))
        for _ in range(5):
            tuner.step(next(count) + 150)
        steps.append(milliseconds(lambda t=tuner, c=count: t.step(next(c) + 150)))
        problem = tuner.problem
        bares.append(bare(piece.teacher, problem.from_teacher[:32], problem.target[:32]))
        tuner.finish()
        print(f"  {piece.name}: {steps[-1]:.2f} ms, bare {bares[-1]:.2f} ms, "
              f"{steps[-1] / bares[-1]:.2f}x")  # fmt: skip
        theirs, ours = target, run(piece.student, ours, context)
    print(f"reconstruction, batch 32, all blocks: {sum(steps):.1f} ms, bare {sum(bares):.1f} ms, "
          f"{sum(steps) / sum(bares):.2f}x")  # fmt: skip


def bare(block: GraphModule, inputs: Tensor, target: Tensor) -> float:
    """Return the time of a float block's forward and backward pass."""
    block.requires_grad_(True)

    def once() -> None:
        (block(inputs) - target).square().mean().backward()

    for _ in range(5):
        once()
    taken = milliseconds(once)
    block.requires_grad_(False)
    return taken


if __name__ == "__main__":
    loaded = load_teacher("zsq:resnet20_cifar10")
    reconstruction(loaded)
    synthesis(loaded)
