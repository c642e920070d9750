# SPDX-License-Identifier: Apache-2.0
"""Measured latency: each layer's time in ONNX Runtime, at each bit-width."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import onnxruntime
from torch import Tensor

from zsq.config import Recipe, load_recipe
from zsq.errors import RunError
from zsq.export.deploy import to_integer
from zsq.export.onnx import INPUT, write_integer
from zsq.runtime.context import Context
from zsq.settings import Bits, Override
from zsq.stages import tune
from zsq.student import Student, attach
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher

#: Runs of one image that are profiled, after as many that are not.
RUNS = 50
#: Profiles are in microseconds.
_PER_MS = 1e3


def measure_latency(
    teacher: Teacher, recipe: Recipe, images: ImageSet, candidates: Sequence[int], context: Context
) -> dict[str, dict[int, float]]:  # fmt: skip
    """Return each layer's median time for one image, by bit-width; never less for more bits.

    The whole network is exported with all layers at one width, run by ONNX Runtime on one thread
    with its profiler, and read off layer by layer, fused activations included.

    Args:
        teacher: stays as it is.
        recipe: names protocol and activation bits.
        images: calibrate activations.
        candidates: bit-widths.
        context: device and progress.

    Raises:
        RunError: a layer does not appear in the runtime's profile.

    Returns:
        {path: {bits: milliseconds}}. On CPUs ONNX Runtime unpacks every width to 8 bits when it
        loads a file, so that the widths differ by noise alone: there a size is the better budget.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with context.reporter.task("latency", len(candidates)) as task:
        for bits in candidates:
            widths = Bits(weights=bits, activations=recipe.bits.activations)
            everywhere = [Override(match="*", weights=bits).model_dump()]
            uniform = load_recipe(
                recipe, tuning={"method": "calibrate"}, bits=widths, overrides=everywhere
            )
            student = tune(teacher, attach(teacher, uniform), images, context=context)
            for path, milliseconds in _profile(student.to("cpu"), images.images).items():
                found[path][bits] = milliseconds
            task.advance(1)
    # more bits are never faster: what looks so is noise
    return {path: _rising(values) for path, values in found.items()}


def _rising(values: Mapping[int, float]) -> dict[int, float]:
    highest, result = 0.0, {}
    for bits in sorted(values):
        highest = max(highest, values[bits])
        result[bits] = highest
    return result


def _profile(student: Student, images: Tensor) -> dict[str, float]:
    """Export, run, and read off what each layer took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_integer(to_integer(student, images), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        image = {INPUT: images[:1].numpy()}
        for _ in range(2 * RUNS):
            session.run(None, image)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            times[name.removesuffix("_kernel_time")].append(event["dur"] / _PER_MS)
    return {path: _of_layer(times, path) for path in student.layers()}


def _of_layer(times: Mapping[str, list[float]], path: str) -> float:
    """Add up the median times of a layer's nodes: one, or more where it is called more than once."""
    node = re.compile(rf"{re.escape(path)}(_reused\d+)?(_token_\d+)?")
    found = [median(values[RUNS:]) for name, values in times.items() if node.fullmatch(name)]
    if not found:
        raise RunError(
            f"ONNX Runtime's profile has no time for layer {path!r}; use a size or bit operations as "
            "budget."
        )
    return sum(found)
