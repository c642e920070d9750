# SPDX-License-Identifier: Apache-2.0
"""The AIT ablation: a host, its divergence term alone, and gradient inundation on top.

The generator does not depend on the student, so all variants of a host learn from one stream of
images, side by side: equal images, one generator's cost. Results are appended as JSON lines.

    python benchmarks/finetuning.py resnet20_cifar10 --hosts gdfq qimera --bits w4a4 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from zsq.config import Recipe, load_recipe
from zsq.evaluation.folder import open_folder
from zsq.evaluation.metrics import evaluate_networks
from zsq.functional.schedules import milestone_factor
from zsq.preparation import prepare
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.runtime.progress import make_reporter
from zsq.runtime.seeds import seeded
from zsq.student import Student
from zsq.synthesis.batches import Batch
from zsq.synthesis.images import ImageSet
from zsq.synthesis.learner import GeneratorLearner
from zsq.synthesis.warming import warmed_generator
from zsq.teacher.teacher import Teacher, load_teacher
from zsq.tuning.finetune import FineTuner
from zsq.tuning.fusing import fused_rounding
from zsq.tuning.starting import begin_with_reconstruction

SHARED = Path(os.environ.get("ZSQ_SHARED", Path(__file__).parents[2] / "shared"))
RESULTS = Path(__file__).parent / "results" / "finetuning.jsonl"
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
TINY = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NETWORKS = {
    "resnet20_cifar10": ("zsq:resnet20_cifar10", "cifar10", (3, 32, 32), CIFAR),
    "resnet18_tiny": (f"{SHARED}/teachers/models.py:resnet18_tiny", "tiny_imagenet", (3, 64, 64), TINY),
    "mobilenetv2_tiny": (f"{SHARED}/teachers/models.py:mobilenetv2_tiny", "tiny_imagenet", (3, 64, 64), TINY),
}  # fmt: skip
KL_ONLY = ["tuning.losses.ce=0", "tuning.weight_decay=0"]
INUNDATED = ["tuning.inundation={target: 1.0e-3}"]
SAMPLE = ["tuning.kl_mean=sample"]
#: Rows of the table: what each changes about its host. "KL + GI" is the recipe HOST+ait.
VARIANTS: dict[str, list[str]] = {
    "calibration only": ["tuning.lr=1e-12", "tuning.weight_decay=0"],
    "host": [],
    "KL only": KL_ONLY,
    "KL + GI": [*KL_ONLY, *INUNDATED],
    "KL per sample": [*KL_ONLY, *SAMPLE],
    "KL per sample + GI": [*KL_ONLY, *INUNDATED, *SAMPLE],
}


class Stream:
    """Hands one batch to every student."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.batch: Batch | None = None

    def next(self, rate: float) -> Batch:
        """Return the batch that was set last."""
        assert self.batch is not None
        return self.batch


def ablation(
    teacher: Teacher, host: str, bits: list[str], seed: int, schedule: str, settings: list[str],
    variants: list[str],
) -> dict[tuple[str, str], FineTuner]:  # fmt: skip
    """Train every variant of a host at every bit-width on one generator's images, from one start."""
    context = Context(seed, make_policy(), make_reporter())
    with seeded(seed, "finetune"), contextlib.ExitStack() as during:
        base = load_recipe(host, schedule=schedule, settings=settings)
        total = base.synthesis.steps + base.tuning.steps
        images = None
        if base.tuning.start is None:
            generator = GeneratorLearner(teacher, base.synthesis, context, total)
        else:
            generator, images = warmed_generator(
                teacher, base.synthesis, context, base.tuning.steps
            )
            total = base.tuning.steps
        pieces = Path(during.enter_context(tempfile.TemporaryDirectory()))
        students = {}
        for width in bits:
            for name in variants:
                changes = [*VARIANTS[name], *settings]
                recipe = load_recipe(host, bits=width, schedule=schedule, settings=changes)
                kept = replace(context, checkpoints=Checkpoints(pieces / width))
                ready, student = _begun(teacher, recipe, images, kept)
                tuner = FineTuner(ready, student, Stream(generator.warmup), recipe.tuning, context)
                during.enter_context(
                    fused_rounding(
                        tuner.ranges.values(),
                        context.policy,
                        recipe.tuning.steps,
                        context.reporter.note,
                    )
                )
                students[width, name] = tuner
        first = generator.warmup - base.tuning.range_steps  # what is before concerns no student
        with context.reporter.task(f"{host}, seed {seed}", total) as task:
            for step in range(total):
                factor = milestone_factor(step / total, base.tuning.milestones, base.tuning.decay)
                batch = generator.next(factor)
                for tuner in students.values() if step >= first else ():
                    tuner.source.batch = batch
                    tuner.step(step)
                task.advance(1, loss=batch.terms["generator_bns"])
        for tuner in students.values():
            tuner.average.settle()
    return students


def _begun(
    teacher: Teacher, recipe: Recipe, images: ImageSet | None, context: Context
) -> tuple[Teacher, Student]:
    """Return a teacher and a student as fine-tuning finds them; checkpoints let variants share a start."""
    ready, student = prepare(teacher, recipe, images, context=context)
    if images is not None:
        begin_with_reconstruction(ready, student, images, context)
    return ready, student


def main() -> None:
    """Run the ablation and append its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--hosts", nargs="+", default=["gdfq", "qimera", "autorecon"])
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--schedule", choices=["quick", "full"], default="quick")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    asked = parser.parse_args()
    model, data, shape, normal = NETWORKS[asked.network]
    teacher = load_teacher(model, input_shape=shape, **normal)
    folder = open_folder(SHARED / "data" / data / "test", input_shape=shape, **normal)
    RESULTS.parent.mkdir(exist_ok=True)
    for host in asked.hosts:
        for seed in asked.seeds:
            start = time.perf_counter()
            tuners = ablation(teacher, host, asked.bits, seed, asked.schedule, asked.settings,
                              asked.variants)  # fmt: skip
            seconds = time.perf_counter() - start
            networks = {f"{w}|{n}": t.student.copy().freeze() for (w, n), t in tuners.items()}
            scores = evaluate_networks({"teacher": teacher, **networks}, folder.batches(250)).scores
            top = scores["teacher"].top1
            for key in networks:
                width, name = key.split("|")
                row = {
                    "network": asked.network, "host": host, "variant": name, "bits": width,
                    "seed": seed, "schedule": asked.schedule, "settings": asked.settings,
                    "teacher": top, "student": scores[key].top1,
                    "drop": round(top - scores[key].top1, 2), "seconds": round(seconds),
                    "tuning": tuners[width, name].settings.model_dump(mode="json"),
                }  # fmt: skip
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(host, width, seed, name, row["student"], row["drop"], file=sys.stderr)


if __name__ == "__main__":
    main()
