# SPDX-License-Identifier: Apache-2.0
"""Any synthesiser with any tuner: which images suit which training?

Images of every source are made once per seed (and kept in a cache folder), then used by every tuner
at every bit-width. Appends a JSON line a cell.

    python benchmarks/interchange.py --sources genie hast intraq zeroq gdfq noise real --tuners genie hast
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import torch

from zsq.config import Recipe, load_recipe
from zsq.evaluation.folder import load_images, open_folder
from zsq.evaluation.metrics import evaluate_networks
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.runtime.progress import make_reporter
from zsq.stages import synthesize, tuned
from zsq.synthesis.images import ImageSet, predict
from zsq.teacher.teacher import Teacher, load_teacher

SHARED = Path(os.environ.get("ZSQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
RESULTS = Path(__file__).parent / "results" / "interchange.jsonl"
SOURCES = ("genie", "hast", "intraq", "zeroq", "gdfq", "noise", "real")


def images_of(source: str, count: int, seed: int, teacher: Teacher, cache: Path) -> ImageSet:
    """Return a source's images, from the cache where they were made before."""
    path = cache / f"{source}_{count}_{seed}{_digest(source, count)}.safetensors"
    if not path.exists():
        context = Context(seed, make_policy(), make_reporter())
        _make(source, count, seed, teacher, context).save(path)
    return ImageSet.load(path)


def _make(source: str, count: int, seed: int, teacher: Teacher, context: Context) -> ImageSet:
    info = teacher.info
    if source == "noise":
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(count, *info.input_shape, generator=generator)
        return ImageSet(pixels, predict(teacher, pixels, context), {"method": "noise"})
    if source == "real":
        folder = open_folder(SHARED / "data" / "cifar10" / "train", input_shape=info.input_shape,
                             mean=info.mean, std=info.std)  # fmt: skip
        return ImageSet(*load_images(folder, count, seed), {"method": "real"})
    return synthesize(teacher, _recipe(source, count), context=context)


def _recipe(source: str, count: int) -> Recipe:
    return load_recipe(source, schedule="quick", settings=[f"synthesis.images={count}"])


def _digest(source: str, count: int) -> str:
    """Say what made a source's images, so that those of another recipe of that name are made anew."""
    if source in {"noise", "real"}:
        return ""
    made_by = _recipe(source, count).synthesis.model_dump_json()
    return "_" + hashlib.sha256(made_by.encode()).hexdigest()[:8]


def main() -> None:
    """Fill the table's cells that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--tuners", nargs="+", default=["genie", "hast"])
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    asked = parser.parse_args()
    teacher = load_teacher("zsq:resnet20_cifar10")
    info = teacher.info
    test = open_folder(SHARED / "data" / "cifar10" / "test", input_shape=info.input_shape,
                       mean=info.mean, std=info.std)  # fmt: skip
    asked.cache.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        for source in asked.sources:
            images = images_of(source, asked.images, seed, teacher, asked.cache)
            for tuner in asked.tuners:
                for bits in asked.bits:
                    recipe = load_recipe(
                        tuner, bits=bits, schedule="quick", settings=asked.settings
                    )
                    start = time.perf_counter()
                    context = Context(seed, make_policy(), make_reporter())
                    student = tuned(teacher, recipe, images, context)
                    seconds = time.perf_counter() - start
                    found = evaluate_networks(
                        {"teacher": teacher, "student": student}, test.batches(200)
                    )
                    row = {
                        "source": source, "images": len(images), "tuner": tuner, "bits": bits,
                        "protocol": recipe.protocol, "seed": seed, "settings": asked.settings,
                        "teacher": found.scores["teacher"].top1, "student": found.scores["student"].top1,
                        "drop": round(found.difference("teacher", "student").points, 2),
                        "stderr": round(found.difference("teacher", "student").stderr, 2),
                        "seconds": round(seconds), "tuning": recipe.tuning.model_dump(mode="json"),
                    }  # fmt: skip
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
