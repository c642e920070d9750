# SPDX-License-Identifier: Apache-2.0
"""Measured latency: each layer's share of the time in ONNX Runtime, at each bit-width."""

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
from zsq.export.parity import latencies, open_session
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
    """Return each layer's share of the time for one image, by bit-width; never less for more bits.

    The whole network is exported with all layers at one width, run by ONNX Runtime on one thread
    with its profiler, and read off layer by layer, fused activations included. The profiler slows
    small layers down and additions and pools belong to no layer, so all times are multiplied by one
    factor, with which the layers of the widest file add up to the median of its runs without the
    profiler: a choice of bits then has a time that can be compared with that of its file.

    Args:
        teacher: stays as it is.
        recipe: names protocol and bits of activations, overrides included.
        images: calibrate activations.
        candidates: bit-widths.
        context: device and progress.

    Raises:
        RunError: a layer does not appear in the runtime's profile, or the runtime refuses the file.

    Returns:
        {path: {bits: milliseconds}}. On CPUs ONNX Runtime unpacks every width to 8 bits when it
        loads a file, so that the widths differ by noise alone: there a size is the better budget.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    widest, whole = max(candidates), 0.0
    with context.reporter.task("latency", len(candidates)) as task:
        for bits in candidates:
            widths = Bits(weights=bits, activations=recipe.bits.activations)
            everywhere = (*recipe.overrides, Override(match="*", weights=bits))
            uniform = load_recipe(
                recipe, tuning={"method": "calibrate"}, bits=widths, overrides=everywhere
            )
            student = tune(teacher, attach(teacher, uniform), images, context=context)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                write_integer(to_integer(student.to("cpu"), images.images), file)
                for path, milliseconds in _profile(file, student, images.images[:1]).items():
                    found[path][bits] = milliseconds
                if bits == widest:
                    whole = _whole(file, images.images[:1])
            task.advance(1)
    # more bits are never faster: what looks so is noise
    rising = {path: _rising(values) for path, values in found.items()}
    factor = whole / sum(values[widest] for values in rising.values())
    return {path: {b: factor * ms for b, ms in values.items()} for path, values in rising.items()}


def _whole(file: Path, image: Tensor) -> float:
    """Return the median milliseconds of one run without the profiler."""
    return latencies([open_session(file, threads=1)], image)[0]


def _rising(values: Mapping[int, float]) -> dict[int, float]:
    highest, result = 0.0, {}
    for bits in sorted(values):
        highest = max(highest, values[bits])
        result[bits] = highest
    return result


def _profile(file: Path, student: Student, image: Tensor) -> dict[str, float]:
    """Run a student's file with the profiler, and read off what each layer took."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_name("profile"))
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    for _ in range(2 * RUNS):
        session.run(None, {INPUT: image.numpy()})
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
