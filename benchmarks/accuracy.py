# SPDX-License-Identifier: Apache-2.0
"""Accuracy lost by quantizing without data, on trained networks that are not part of the package.

One synthesis per seed serves every bit width, unless a generator learns along with the student. Prints
one line a run and appends it to a JSON-lines file, so that an interrupted benchmark keeps what it has.

    python benchmarks/accuracy.py resnet20_cifar10 --bits w4a4 w3a3 w2a4 --seeds 0 1 2

Behind a width that made images, `mixed:4` has `zsq bits` choose widths of weights and of activations, 4 on
average each, on these images; `w4:4` has it choose those of activations alone, beside weights of 4 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import zsq
from zsq.artifact.runfolder import RunFolder
from zsq.config import load_recipe
from zsq.judge import evaluate
from zsq.preparation import has_a_learning_generator
from zsq.runtime.progress import make_reporter
from zsq.synthesis.images import ImageSet

SHARED = Path(os.environ.get("ZSQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NETWORKS = {
    "resnet20_cifar10": (CIFAR, (3, 32, 32), "cifar10"),
    "resnet18_tiny": (IMAGENET, (3, 64, 64), "tiny_imagenet"),
    "mobilenetv2_tiny": (IMAGENET, (3, 64, 64), "tiny_imagenet"),
}


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="genie")
    parser.add_argument("--schedule", default="quick")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(options.recipe, schedule=options.schedule, settings=options.settings)
    together = has_a_learning_generator(recipe)
    for seed in options.seeds:
        images = None
        for bits in options.bits:
            row, made = run(options, bits, seed, images)
            images = None if together else made
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def run(
    options: argparse.Namespace, bits: str, seed: int, images: ImageSet | None
) -> tuple[dict[str, object], ImageSet]:
    """Quantize, export and evaluate once; return the figures and the images used."""
    normalisation, shape, data = NETWORKS[options.network]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model = f"{SHARED / 'teachers' / 'models.py'}:{options.network}"
        widths = bits
        if ":" in bits:
            widths = chosen(options, model, shape, bits, images, Path(folder))
        zsq.quantize(
            model, options.recipe, bits=widths, schedule=options.schedule, settings=options.settings,
            input_shape=shape, seed=seed, images=images, out=Path(folder) / "run", device=options.device,
            reporter=make_reporter("quiet"), report=False, **normalisation,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        record = RunFolder.open(Path(folder) / "run").record
        scores = evaluate(Path(folder) / "run", SHARED / "data" / data / "test")
        made = ImageSet.load(Path(folder) / "run" / "images.safetensors")
    export = record["results"]["export"]
    teacher, student = scores["teacher"]["top1"], scores["student"]["top1"]
    onnx = scores["onnx"]["top1"]
    return {
        "network": options.network, "bits": bits, "recipe": options.recipe,
        "schedule": options.schedule, "settings": options.settings, "seed": seed,
        "teacher": teacher, "student": student, "drop": round(teacher - student, 2),
        "agreement": scores["agreement"], "divergence": round(scores["divergence"]["nats"], 5),
        "onnx": onnx, "onnx_further": round(student - onnx, 2),
        "export": {k: export[k] for k in ("agreement", "fused", "convs", "ratio", "speedup")},
        "resolved": record["identity"]["recipe"], "seconds": record["timings"], "total_seconds": round(seconds, 1),
    }, made  # fmt: skip


def chosen(
    options: argparse.Namespace, model: str, shape: tuple[int, ...], wanted: str,
    images: ImageSet | None, folder: Path,
) -> str:  # fmt: skip
    """Choose widths for an average of weights and of activations, or of these alone; return the bits file."""
    if images is None:
        raise SystemExit(
            "mixed widths are chosen on images that another width made: name that first."
        )
    weights, _, average = wanted.partition(":")
    mixed = weights == "mixed"
    plan = zsq.choose_bits(
        zsq.load_teacher(model, input_shape=shape), average if mixed else None, options.recipe,
        bits=None if mixed else f"{weights}a4", activations=float(average),
        schedule=options.schedule, settings=options.settings, images=images,
    )  # fmt: skip
    plan.save(folder / "bits.yaml")
    return str(folder / "bits.yaml")


if __name__ == "__main__":
    main()
