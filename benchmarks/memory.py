# SPDX-License-Identifier: Apache-2.0
"""Does a large network fit the host's memory? ResNet-50 at 224 pixels with 1,024 images.

Peak memory does not depend on the number of steps or on what the weights and images are, so weights are
random, a synthesis batch makes two steps and every block one. Prints the peak of each part.

    python benchmarks/memory.py --memory 8GB
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from pytorchcv.model_provider import get_model

import zsq
from zsq.config import load_recipe
from zsq.runtime.amounts import parse_memory
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.stages import synthesize
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import load_teacher

SHAPE = (3, 224, 224)


def network() -> torch.nn.Module:
    """Return ResNet-50 with random weights."""
    torch.manual_seed(0)
    return get_model("resnet50", pretrained=False)  # type: ignore[no-any-return]


def synthesis(memory: str) -> None:
    """Make two steps of GENIE-D on a batch of the published size."""
    recipe = load_recipe(
        "genie", large=True, settings=["synthesis.images=128", "synthesis.steps=2"]
    )
    policy = make_policy(compile=False, memory=parse_memory(memory))
    synthesize(load_teacher(network(), input_shape=SHAPE), recipe, context=Context(policy=policy))


def reconstruction(memory: str) -> None:
    """Reconstruct every block for one step on 1,024 images, export, and run the file."""
    generator = torch.Generator().manual_seed(0)
    images = ImageSet(
        torch.randn(1024, *SHAPE, generator=generator),
        torch.randint(1000, (1024,), generator=generator),
    )
    with tempfile.TemporaryDirectory() as folder:
        zsq.quantize(
            network(), "genie", bits="w4a4", input_shape=SHAPE, images=images, compile=False,
            settings=["tuning.steps=1"], memory=memory, out=Path(folder) / "run", report=False,
        )  # fmt: skip


def measured(part: str, memory: str) -> None:
    """Run one part and print its time and its process's peak."""
    start = time.perf_counter()
    {"synthesis": synthesis, "reconstruction": reconstruction}[part](memory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{part}: peak {peak:.1f} GB, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Measure both parts, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--parts", nargs="+", default=["synthesis", "reconstruction"])
    options = parser.parse_args()
    for part in options.parts:
        process = multiprocessing.get_context("spawn").Process(
            target=measured, args=(part, options.memory)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
