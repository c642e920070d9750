# SPDX-License-Identifier: Apache-2.0
"""One loop's measurement, in the process that calls."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zsq.bench.finetuning import finetuning_loop
from zsq.bench.flops import count_flops
from zsq.bench.loops import COUNTED_IMAGES, Build, Job, Part
from zsq.bench.memory import PeakMemory
from zsq.bench.peak import matmul_peak
from zsq.bench.reconstruction import reconstruction_loop
from zsq.bench.synthesis import genie_loop, pixel_loop
from zsq.bench.turns import EnoughError, Times, Turns
from zsq.errors import UsageError
from zsq.runtime.policy import Precision, make_policy, on_device
from zsq.runtime.seeds import seeded
from zsq.teacher.teacher import load_teacher

#: The loops that can be measured.
LOOPS: dict[str, Build] = {
    "genie": genie_loop,
    "pixels": pixel_loop,
    "finetuning": finetuning_loop,
    "reconstruction": reconstruction_loop,
}


@dataclass(frozen=True)
class Request:
    """What to measure; plain data, so that it can be handed to another process.

    Attributes:
        model: a MODEL string, as for `zsq.load_teacher`.
        loop: a name of `LOOPS`.
        batch: images a step; None: what the loop's recipe says.
        images: size of the set; None: the loop's smallest.
        steps: of the loop (of each block, in reconstruction) to time.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: as for `zsq.quantize`.
        compile: as for `zsq.quantize`.
        cuda_graphs: as for `zsq.quantize`.
        plain: measure the published loop in plain eager float32 too.
        input_shape: of one image, where the model does not know it.
        weights: a checkpoint, or ``"random"``.
        allow_pickle: read pickled checkpoints.
    """

    model: str
    loop: str = "genie"
    batch: int | None = None
    images: int | None = None
    steps: int = 50
    device: str = "cpu"
    precision: Precision = "auto"
    compile: bool = True
    cuda_graphs: bool = False
    plain: bool = False
    input_shape: tuple[int, ...] | None = None
    weights: str | None = None
    allow_pickle: bool = False

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UsageError: an unknown loop or device, or a number that is too small.
        """
        make_policy(self.device, compile=self.compile, cuda_graphs=self.cuda_graphs)
        if self.loop not in LOOPS:
            raise UsageError(f"--loop {self.loop!r} is unknown; choose among {', '.join(LOOPS)}.")
        for name, value, least in (
            ("--batch", self.batch, 2), ("--images", self.images, 2), ("--steps", self.steps, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise UsageError(f"{name} {value} must be at least {least}.")


@dataclass(frozen=True)
class _Figures:
    """One part's figures; they keep none of its tensors alive."""

    name: str
    batch: int
    schedule: int
    dtype: torch.dtype
    compiled: bool
    flops: int
    times: Times


#: The bare passes once more, where they are compiled.
EAGER = "bare, eager"
#: Speed of a matrix product on this device, FLOP/s by precision.
Peaks = dict[torch.dtype, float]


def measure(request: Request, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure one loop.

    Args:
        request: which, and how.
        note: told what is worth knowing, such as a compilation that failed.

    Returns:
        Plain data. Times are medians over turns, in seconds; those of reconstruction are sums over
        blocks, a step of each. FLOPs are those of the bare passes (`zsq.bench.flops`), and the
        share is of the matrix product's speed on this device in each part's precision.

    Raises:
        UsageError: nothing can be measured like this.
    """
    request.check()
    policy = make_policy(
        request.device, request.precision, request.compile, cuda_graphs=request.cuda_graphs
    )
    teacher = load_teacher(
        request.model, input_shape=request.input_shape, weights=request.weights,
        allow_pickle=request.allow_pickle,
    )  # fmt: skip
    job = Job(teacher, policy, request.batch, request.images, note)
    memory = PeakMemory(policy.device)
    with seeded(0, "bench", request.loop), on_device(policy.device):
        found = [_figures(part, request, memory) for part in LOOPS[request.loop](job)]
    peaks = {dtype: matmul_peak(policy.device, dtype) for dtype in {f.dtype for f in found}}
    heaviest = max(found, key=lambda f: f.flops)
    result = {
        "model": request.model, "loop": request.loop, "input_shape": list(teacher.info.input_shape),
        "parameters": sum(p.numel() for p in teacher.network.parameters()),
        "batch": found[0].batch, "images": request.images,
        "precision": str(heaviest.dtype).removeprefix("torch."), "compiled": heaviest.compiled,
        "cuda_graphs": request.cuda_graphs,
        "steps": request.steps, "threads": torch.get_num_threads(),
    }  # fmt: skip
    result |= _rates([f.times.median() for f in found], found, peaks)
    memories = [f.times.peak_bytes for f in found if f.times.peak_bytes is not None]
    result |= {"peak_memory_bytes": max(memories, default=None), "memory_kind": memory.kind}
    result["matmul_peak"] = peaks[heaviest.dtype]
    result |= _rivals(found, peaks)
    if len(found) > 1:
        result["parts"] = [_part_row(f, peaks) for f in found]
    return result


def _figures(part: Part, request: Request, memory: PeakMemory) -> _Figures:
    rivals = {"bare": part.bare_step} | ({"plain": part.plain} if request.plain else {})
    if part.compiled:
        rivals[EAGER] = part.eager_bare_step
    turns = Turns(request.steps, rivals, part.policy.device, memory, part.skip)
    with contextlib.suppress(EnoughError):
        part.drive(turns.tick)
    _keep_the_faster(turns.times)
    flops = count_flops(part.counted_step()) * part.batch // COUNTED_IMAGES
    return _Figures(
        part.name, part.batch, part.schedule, part.policy.dtype, part.compiled, flops, turns.times
    )


def _keep_the_faster(times: Times) -> None:
    """Let the bare passes be the faster of compiled and eager: compiling does not pay for all networks."""
    eager = times.rivals.pop(EAGER, None)
    if eager and statistics.median(eager) < times.median("bare"):
        times.rivals["bare"] = eager


def _rates(seconds: list[float], found: list[_Figures], peaks: Peaks) -> dict[str, Any]:
    """Return what follows from the time of a step of every part."""
    total, flops = sum(seconds), sum(f.flops for f in found)
    images = sum(f.batch for f in found)
    schedule = sum(s * f.schedule for s, f in zip(seconds, found, strict=True))
    least = sum(f.flops / peaks[f.dtype] for f in found)  # at the peak of each part's precision
    return {
        "seconds": total, "steps_per_second": len(found) / total, "images_per_second": images / total,
        "flops": flops, "flops_per_second": flops / total, "share_of_peak": least / total,
        "schedule_seconds": schedule,
    }  # fmt: skip


def _rivals(found: list[_Figures], peaks: Peaks) -> dict[str, Any]:
    """Return the figures of the bare passes and of the plain loop, and the quotients."""
    total, result = sum(f.times.median() for f in found), dict[str, Any]()
    for name, quotient in (("bare", "ratio_to_bare"), ("plain", "speedup_over_plain")):
        if name not in found[0].times.rivals:
            continue
        seconds = [f.times.median(name) for f in found]
        rates = _rates(seconds, found, peaks)
        kept = ["seconds", "steps_per_second", "images_per_second"]
        if name == "bare":  # the plain loop's passes are not those that were counted
            kept += ["flops_per_second", "share_of_peak"]
        result[name] = {key: rates[key] for key in kept}
        own = sum(seconds)
        result[quotient] = total / own if name == "bare" else own / total
    return result


def _part_row(figures: _Figures, peaks: Peaks) -> dict[str, Any]:
    rates = _rates([figures.times.median()], [figures], peaks)
    kept = {key: rates[key] for key in ("seconds", "flops", "share_of_peak")}
    return {"name": figures.name, **kept, **_rivals([figures], peaks)}
