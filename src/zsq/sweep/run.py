# SPDX-License-Identifier: Apache-2.0
"""The cells of a sweep that are missing, on this machine or as tasks of a Ray cluster."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from zsq.errors import UsageError
from zsq.runtime.files import make_folder
from zsq.runtime.machine import usable_cores
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.sweep.cell import run_cell
from zsq.sweep.cluster import run_on_ray
from zsq.sweep.sweepfile import Cell, Sweep
from zsq.sweep.tables import write_results


def run_sweep(
    sweep: Sweep, out: str | Path, *, workers: int = 1, ray: str | None = None,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Do what is missing of a sweep.

    Args:
        sweep: what to run.
        out: one folder per cell, ``results.json`` and ``results.md``, written after every cell. On
            a cluster it is a folder that all machines share.
        workers: cells at a time; the cores are shared out among them.
        ray: address of a Ray cluster, see `zsq.sweep.cluster.run_on_ray`; None: this machine alone.
        reporter: progress.

    Returns:
        A row per cell, in the order of the sweep; failed ones say why.

    Raises:
        UsageError: no worker, or no Ray where it is asked for.
        RunError: no such cluster.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1.")
    place, cells = Path(out).absolute(), sweep.cells()
    if (place / "run.json").exists():
        raise UsageError(f"{out} holds a run; choose another folder for the sweep with -o.")
    make_folder(place)
    rows: dict[Cell, dict[str, Any]] = {}
    reporter = reporter or QuietReporter()
    work = functools.partial(run_cell, sweep, place)
    done = (
        _locally(work, cells, workers, sweep.gpus())
        if ray is None
        else run_on_ray(work, cells, ray, workers=workers, gpus=int(sweep.asks_for_gpu()))
    )
    with reporter.task("sweep", len(cells)) as task:
        for cell, row in done:
            rows[cell] = _named(cell) | row
            write_results(place, [rows[cell] for cell in cells if cell in rows])
            task.advance(1)
    return [rows[cell] for cell in cells]


def _locally(
    work: Callable[[Cell, int, str | None], dict[str, Any]], cells: list[Cell], workers: int, gpus: list[str]
) -> Iterator[tuple[Cell, dict[str, Any]]]:  # fmt: skip
    """Run cells on this machine, dealt out to its GPUs; yield each with its row when it is done."""
    threads = max(1, usable_cores() // workers)
    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for worker in range(workers):
        places.put(gpus[worker % len(gpus)] if gpus else None)

    def do(cell: Cell) -> dict[str, Any]:
        gpu = places.get()
        try:
            return work(cell, threads, gpu)
        finally:
            places.put(gpu)

    pool = ThreadPoolExecutor(workers)
    try:
        started = {pool.submit(do, cell): cell for cell in cells}
        for future in as_completed(started):
            yield started[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted, a sweep begins no further cell


def _named(cell: Cell) -> dict[str, Any]:
    """Return the part of a row that says which cell it is."""
    return {**vars(cell), "folder": cell.folder}
