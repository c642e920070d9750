# SPDX-License-Identifier: Apache-2.0
"""Time of a step of every loop, beside the bare network's.

Nothing else should run meanwhile.

    python benchmarks/speed.py [synthesis] [pixels] [reconstruction] [finetuning] [recording] [inundation]
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.config import GenieSynthesis, load_recipe
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog
from zsq.runtime.policy import make_policy
from zsq.runtime.progress import QuietReporter
from zsq.student import attach, prepared_network
from zsq.synthesis.generators import build_generator
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.labels import plain_labels
from zsq.synthesis.learner import GeneratorLearner
from zsq.synthesis.pixels import synthesize_pixels
from zsq.teacher.teacher import Teacher, load_teacher
from zsq.tuning.finetune import RECORD_EVERY, FineTuner
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


class Stopwatch(QuietReporter):
    """Notes when each step of a task is done."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def task(self, title: str, total: int, completed: int = 0) -> Ticking:
        """Return a task whose steps are timed."""
        return Ticking(self.times)

    def median_after(self, first: int) -> float:
        """Return the median milliseconds of a step, leaving out the first ones."""
        return 1000 * statistics.median(
            b - a for a, b in zip(self.times[first:-1], self.times[first + 1 :], strict=True)
        )


class Ticking:
    """A task that times its steps."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def __enter__(self) -> Ticking:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, steps: int, **values: object) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


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


def pixels(teacher: Teacher) -> None:
    """Print the time of a step of HAST's pixel synthesis at batch 256, beside the teacher's passes."""
    policy, watch = make_policy(), Stopwatch()
    settings = load_recipe("hast").synthesis.model_copy(update={"images": 256, "steps": 300})
    synthesize_pixels(teacher, settings, Context(policy=policy, reporter=watch))
    step = watch.median_after(50)
    network = policy.place(copy.deepcopy(teacher.network)).requires_grad_(False)
    compiled = torch.compile(network, dynamic=False)
    images = torch.randn(256, *teacher.info.input_shape).contiguous(
        memory_format=torch.channels_last
    )
    images.requires_grad_()

    def once() -> None:
        with policy.autocast():
            logits = compiled(images)
        logits.float().square().mean().backward()

    for _ in range(5):
        once()
    bare_step = milliseconds(once)
    print(f"pixel synthesis (hast), batch 256: {step:.0f} ms a step; forward and input-backward of the "
          f"teacher alone {bare_step:.0f} ms, {step / bare_step:.2f}x")  # fmt: skip


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


def tuner_on_generator(teacher: Teacher, settings: list[str], compile: bool) -> FineTuner:
    """Return a fine-tuning run in float32 whose warm-up is over."""
    recipe = load_recipe(
        "gdfq+ait", bits="w4a4",
        settings=["synthesis.steps=2", "tuning.steps=79200", "tuning.range_steps=2", *settings],
    )  # fmt: skip
    context = Context(policy=make_policy(precision="fp32", compile=compile))
    source = GeneratorLearner(teacher, recipe.synthesis, context, recipe.tuning.steps)
    tuner = FineTuner(teacher, attach(teacher, recipe), source, recipe.tuning, context)
    for step in range(5):
        tuner.step(step)
    return tuner


def finetuning(teacher: Teacher) -> None:
    """Print the time of a whole step at batch 200, float32, and of its bare passes."""
    alone = bare_finetuning(teacher, 200)
    for compile in (False, True):
        tuner = tuner_on_generator(teacher, ["synthesis.batch=200"], compile)
        count = iter(range(5, 1000))
        whole = milliseconds(lambda t=tuner, c=count: t.step(next(c)), 15)
        print(f"fine-tuning with inundation, batch 200, float32, "
              f"{'compiled' if compile else 'eager'}: {whole:.0f} ms a step, bare {alone:.0f} ms, "
              f"{whole / alone:.2f}x")  # fmt: skip


def recording(teacher: Teacher) -> None:
    """Print what fine-tuning's records cost at their default frequency, batch 64, as recipes run."""
    recipe = load_recipe("gdfq+ait", bits="w4a4", schedule="quick", settings=["synthesis.steps=2"])
    with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder) / "m.jsonl") as metrics:
        context = Context(policy=make_policy(), metrics=metrics)
        source = GeneratorLearner(teacher, recipe.synthesis, context, 1000)
        tuner = FineTuner(teacher, attach(teacher, recipe), source, recipe.tuning, context)
        for step in range(30):
            tuner.step(step)
        count = iter(range(10**6 + 1, 10**7, 100))  # neither recorded nor compared
        step_ms = milliseconds(lambda: tuner.step(next(count)), 20)
        batch = source.next(1.0)
        compare = milliseconds(lambda: tuner._compare_gradients(batch, 0), 10)
        look = milliseconds(tuner.watch.look, 10)
    every = recipe.tuning.agreement_every
    share = (compare / every + look / RECORD_EVERY) / step_ms
    print(f"recording: gradients compared in {compare:.0f} ms every {every} steps, integers in {look:.1f} ms "
          f"every {RECORD_EVERY}: {100 * share:.1f} % of a step of {step_ms:.0f} ms")  # fmt: skip


def bare_finetuning(teacher: Teacher, batch: int) -> float:
    """Return the time of the passes alone: generator and teacher, then a float student."""
    recipe, context = load_recipe("gdfq"), Context(policy=make_policy(precision="fp32"))
    generator = context.policy.place(build_generator(teacher, recipe.synthesis, 10, context))
    frozen = context.policy.place(copy.deepcopy(teacher.network)).requires_grad_(False)
    student = context.policy.place(copy.deepcopy(teacher.network)).requires_grad_(True)
    labels = plain_labels(batch, 10, torch.device("cpu"))

    def once() -> None:
        noise = generator.draw_noise(labels)
        images = generator(noise, labels.classes, labels.weights)
        frozen(images).square().mean().backward()
        student(images.detach()).square().mean().backward()

    for _ in range(3):
        once()
    return milliseconds(once, 15)


def inundation() -> None:
    """Print what inundation adds to a step of ResNet-18 at 224 pixels, batch 16, float32.

    Steps with and without it take turns, so that both see the same machine.
    """
    teacher = load_teacher("pytorchcv:resnet18", weights="random")
    tuners = {
        name: tuner_on_generator(teacher, ["synthesis.batch=16", *change], False)
        for name, change in (("with", []), ("without", ["tuning.inundation=null"]))
    }
    steps: dict[str, list[float]] = {name: [] for name in tuners}
    rules: dict[str, list[float]] = {name: [] for name in tuners}
    for step in range(51, 58):  # none of them is recorded
        for name, tuner in tuners.items():
            steps[name].append(milliseconds(lambda t=tuner, s=step: t.step(s), 1))
            target = 1e-4 if name == "with" else 0.0
            rules[name].append(
                milliseconds(lambda r=tuner.weight_rule, g=target: r.step(1e-6, target=g), 1)
            )
    whole = {name: statistics.median(times) for name, times in steps.items()}
    added = statistics.median(rules["with"]) - statistics.median(rules["without"])
    print(f"inundation, ResNet-18 at 224, batch 16, float32: adds {added:.0f} ms to the update of the "
          f"weights, {100 * added / whole['without']:.1f} % of a step; whole steps {whole['with']:.0f} ms "
          f"with it, {whole['without']:.0f} ms without")  # fmt: skip


if __name__ == "__main__":
    loaded = load_teacher("zsq:resnet20_cifar10")
    wanted = sys.argv[1:] or [
        "reconstruction",
        "synthesis",
        "pixels",
        "finetuning",
        "recording",
        "inundation",
    ]
    if "reconstruction" in wanted:
        reconstruction(loaded)
    if "synthesis" in wanted:
        synthesis(loaded)
    if "pixels" in wanted:
        pixels(loaded)
    if "finetuning" in wanted:
        finetuning(loaded)
    if "recording" in wanted:
        recording(loaded)
    if "inundation" in wanted:
        inundation()
