# SPDX-License-Identifier: Apache-2.0
"""What `zsq bench` does: measure loops one after the other, and how they grow."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from zsq.bench.measure import LOOPS, Request, measure
from zsq.bench.processes import measure_apart
from zsq.errors import RunError, UsageError
from zsq.runtime.environment import environment
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.teacher.sources import load_source

#: What grows along each axis unless the sizes are given.
SIZES: dict[str, tuple[str, ...]] = {
    "images": ("128", "256", "512"),
    "batch": ("16", "32", "64", "128"),
    "network": tuple(f"pytorchcv:resnet{n}_cifar10" for n in (20, 56, 110)),
}


def bench(
    request: Request, loops: Iterable[str] = (), *, grow: Sequence[tuple[str, Sequence[str]]] = (),
    apart: bool = True, reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure loops on one network.

    Nothing else should run meanwhile.

    Args:
        request: what to measure; its ``loop`` is replaced.
        loops: names of `zsq.bench.LOOPS`; all of them when empty.
        grow: axes and sizes of growth curves: numbers of images, of images a step, or networks.
            Empty sizes mean `SIZES`.
        apart: each loop in a process of its own, so that on a CPU its memory is its own.
        reporter: progress.

    Returns:
        Plain data: ``model``, ``device``, ``environment``, ``loops`` (one object each, as
        `zsq.bench.measure.measure` returns) and, where asked for, ``growth``.

    Raises:
        UsageError: an unknown loop or axis, or a network that cannot be measured.
        RunError: a measurement failed.

    Example:
        >>> request = Request("zsq:resnet20_cifar10", batch=4, steps=2, compile=False)
        >>> found = bench(request, ["genie"], apart=False)
        >>> found["loops"][0]["images_per_second"] > 0
        True
    """
    names = tuple(dict.fromkeys(loops)) or tuple(LOOPS)
    todo = [replace(request, loop=name) for name in names]
    points = [
        (axis, size, _grown(each, axis, size))
        for axis, sizes in grow
        for each in todo
        for size in sizes or _sizes(axis)
    ]
    for each in [*todo, *(point for _, _, point in points)]:
        each.check()
    _check_models([*todo, *(point for _, _, point in points)])
    run, reporter = measure_apart if apart else measure, reporter or QuietReporter()
    result: dict[str, Any] = {
        "model": request.model, "device": _device(request.device), "environment": environment(),
    }  # fmt: skip
    with reporter.task("measuring", len(todo) + len(points)) as task:
        result["loops"] = []
        for each in todo:
            result["loops"].append(run(each, reporter.note))
            task.advance(1)
        if points:
            result["growth"] = []
        for axis, size, each in points:
            result["growth"].append(_point(run, axis, size, each, reporter))
            task.advance(1)
    return result


def _check_models(requests: Iterable[Request]) -> None:
    """Load every network once, before the first is measured: the last may be hours away.

    Raises:
        UsageError: there is no such network, or its weights cannot be read.
    """
    for model, weights, allow in dict.fromkeys(
        (r.model, r.weights, r.allow_pickle) for r in requests
    ):
        load_source(model, weights=weights, allow_pickle=allow)


def _sizes(axis: str) -> tuple[str, ...]:
    if axis not in SIZES:
        raise UsageError(f"--grow {axis!r} is unknown; choose among {', '.join(SIZES)}.")
    return SIZES[axis]


def _grown(request: Request, axis: str, size: str) -> Request:
    """Return a request with one size changed.

    Raises:
        UsageError: an unknown axis, or a size that is no number.
    """
    _sizes(axis)
    if axis == "network":
        return replace(request, model=size, weights="random" if ":" in size else request.weights)
    if not size.isdecimal():
        raise UsageError(
            f"--grow {axis}={size}: {size!r} is no number of images; write sizes like 16,32,64."
        )
    return (
        replace(request, batch=int(size)) if axis == "batch" else replace(request, images=int(size))
    )


def _point(
    run: Callable[..., dict[str, Any]], axis: str, size: str, request: Request, reporter: Reporter
) -> dict[str, Any]:
    """Measure one point of a curve; one that fails, for memory perhaps, says so and ends nothing."""
    point: dict[str, Any] = {"along": axis, "size": size, "loop": request.loop}
    try:
        found = run(request, reporter.note)
    except RunError as error:
        return point | {"error": str(error)}
    kept = ("model", "parameters", "batch", "images", "seconds", "images_per_second",
            "schedule_seconds", "ratio_to_bare", "peak_memory_bytes")  # fmt: skip
    return point | {key: found[key] for key in kept}


def _device(name: str) -> str:
    """Name a device as its maker does."""
    if name.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(name)
    cpu = environment()["cpu"]
    assert isinstance(cpu, dict)
    return str(cpu["name"] or platform.machine())
