# SPDX-License-Identifier: Apache-2.0
"""Many runs from one file: models x recipes x bits x seeds, resumed where they are, one table.

Every cell is a process of its own, `zsq quantize --resume` with the cell's folder: a cell that fails
or is killed costs nothing but itself, and the same sweep started again does what is missing. A cell
that was made with other settings, another recipe or another network than the sweep now says is
refused by that command, and fails: its numbers would be those of another sweep. The processes run on
this machine, or as tasks of a Ray cluster.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import queue
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from zsq.errors import UsageError
from zsq.runtime.files import atomic_write, make_folder
from zsq.runtime.machine import ENDS_WITH_PARENT, usable_cores
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.settings import Part
from zsq.settings.yamlfiles import read_yaml
from zsq.sweep_ray import run_on_ray

#: Options of `zsq quantize` that no sweep's file may give its cells.
_NOT_OPTIONS = ("-o", "--out", "--resume", "--no-resume", "--allow-pickle")


class Sweep(Part):
    """What a sweep file says."""

    models: tuple[str, ...] = Field(min_length=1)
    recipes: tuple[str, ...] = Field(min_length=1)
    bits: tuple[str, ...] = Field(default=("w4a4",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    schedule: Literal["quick", "full"] = "full"
    settings: tuple[str, ...] = ()
    """``KEY=VALUE`` changes, for every cell."""
    options: tuple[str, ...] = ()
    """Further options of `zsq quantize`, e.g. ``--input-shape=3,64,64``."""
    data: str | None = None
    """An ImageFolder to evaluate every cell on."""

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep file.

        Raises:
            UsageError: missing, or not a sweep.
        """
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            needs = (
                "it needs `models` and `recipes`, and may hold `bits`, `seeds`, `schedule`, `settings`, `options` "
                "and `data`"
            )
            raise UsageError(
                f"the sweep {path}: {key}: {reason}; {needs}."
                if key
                else f"the sweep {path}: {reason}."
            ) from error
        except ValueError as error:
            raise UsageError(f"the sweep {path} cannot be read: {error}.") from error

    @model_validator(mode="after")
    def _has_every_cell_once(self) -> Self:
        folders = [cell.folder for cell in self.cells()]
        twice = sorted({folder for folder in folders if folders.count(folder) > 1})
        if twice:
            raise ValueError(
                f"two cells would share the folder {twice[0]}; leave out what its lists hold twice"
            )
        return self

    @model_validator(mode="after")
    def _decides_nothing_for_its_reader(self) -> Self:
        """Models are no options, and what may run code is allowed on the command line alone."""
        for model in self.models:
            if model.startswith("-"):
                raise ValueError(f"the model {model!r} is none: it begins like an option")
        for option in self.options:
            name = option.partition("=")[0]
            if name in _NOT_OPTIONS or re.match(r"-o.", name):
                raise ValueError(
                    f"the option {option!r} is not a cell's: folders follow from the sweep's, cells are always "
                    "resumed, and --allow-pickle is given to `zsq sweep` itself"
                )
        return self

    def asks_for_gpu(self) -> bool:
        """Return whether cells run on a GPU.

        Example:
            >>> Sweep(models=("a",), recipes=("b",), options=("--device=cuda",)).asks_for_gpu()
            True
        """
        return any(option.removeprefix("--device=").startswith("cuda") for option in self.options)

    def gpus(self) -> list[str]:
        """Return this machine's GPUs that local cells may be dealt out to, as CUDA names them.

        None of them where no cell asks for a GPU, or all ask for a certain one.
        """
        if not {"--device=cuda", "cuda"} & set(self.options):
            return []
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]

    def cells(self) -> list[Cell]:
        """Return every combination."""
        return [
            Cell(*combination)
            for combination in itertools.product(self.models, self.recipes, self.bits, self.seeds)
        ]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    model: str
    recipe: str
    bits: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder.

        Example:
            >>> Cell("zsq:resnet20_cifar10", "gdfq+ait", "w4a4", 0).folder
            'zsq_resnet20_cifar10.gdfq+ait.w4a4.0'
        """
        parts = (self.model, self.recipe, self.bits, str(self.seed))
        return ".".join(re.sub(r"[^\w+-]+", "_", part).strip("_") for part in parts)


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
        ray: address of a Ray cluster, see `zsq.sweep_ray.run_on_ray`; None: this machine alone.
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
    work = functools.partial(_run_cell, sweep, place)
    done = (
        _locally(work, cells, workers, sweep.gpus())
        if ray is None
        else run_on_ray(work, cells, ray, workers=workers, gpus=int(sweep.asks_for_gpu()))
    )
    with reporter.task("sweep", len(cells)) as task:
        for cell, row in done:
            rows[cell] = _named(cell) | row
            _write(place, [rows[cell] for cell in cells if cell in rows])
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


def _run_cell(
    sweep: Sweep, place: Path, cell: Cell, threads: int, gpu: str | None = None
) -> dict[str, Any]:
    """Quantize and evaluate one cell, each unless it is done; return what became of it.

    A finished cell too is asked to resume: only `quantize` can tell whether it is what the sweep says.
    """
    folder = place / cell.folder
    failure = _zsq(_command(sweep, cell, folder), threads, gpu)
    if failure:
        return {"status": "failed", "error": failure}
    if sweep.data is not None and not _scores(sweep, _record(folder)):
        failure = _zsq(["evaluate", str(folder), "--data", sweep.data, "--quiet"], threads, gpu)
        if failure:
            return {"status": "not evaluated", "error": failure}
    return {"status": "done"} | _figures(sweep, _record(folder))


def _command(sweep: Sweep, cell: Cell, folder: Path) -> list[str]:
    settings = [part for setting in sweep.settings for part in ("--set", setting)]
    return [
        "quantize", cell.model, "--recipe", cell.recipe, "--bits", cell.bits, "--seed", str(cell.seed),
        "--schedule", sweep.schedule, *settings, *sweep.options, "--resume", "--quiet", "-o", str(folder),
    ]  # fmt: skip


def _zsq(arguments: Sequence[str], threads: int, gpu: str | None = None) -> str:
    """Run a command of zsq, which sees one GPU alone if one is named; return its complaint, or nothing."""
    environment = (
        {"OMP_NUM_THREADS": str(threads)} | os.environ | {ENDS_WITH_PARENT: str(os.getpid())}
    )
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    done = subprocess.run(
        [sys.executable, "-m", "zsq", *arguments], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    # some lines are the borders of a box
    lines = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]
    return lines[-1].strip(" │|") if lines else f"exit code {done.returncode}"


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _scores(sweep: Sweep, record: dict[str, Any]) -> dict[str, Any] | None:
    """Return a run's scores on the sweep's images; on others they are not the sweep's."""
    scores: dict[str, Any] = record.get("results", {}).get("evaluation", {})
    return (
        scores
        if sweep.data is not None and scores.get("data") == os.path.realpath(sweep.data)
        else None
    )


def _figures(sweep: Sweep, record: dict[str, Any]) -> dict[str, Any]:
    """Return a finished run's figures."""
    scores, export = _scores(sweep, record), record["results"].get("export", {})
    figures: dict[str, Any] = {
        "protocol": record["identity"]["recipe"]["protocol"],
        "ratio": export.get("ratio"), "speedup": export.get("speedup"),
        "seconds": round(sum(record["timings"].values()), 1),
    }  # fmt: skip
    if scores:
        figures |= {
            "teacher": scores["teacher"]["top1"], "student": scores["student"]["top1"],
            "drop": scores["drop"]["points"], "stderr": scores["drop"]["stderr"],
            "agreement": scores.get("agreement"), "onnx": scores.get("onnx", {}).get("top1"),
        }  # fmt: skip
    return figures


#: Columns of the table.
COLUMNS = ("model", "recipe", "protocol", "bits", "seed", "teacher", "student", "drop", "stderr", "agreement",
           "onnx", "ratio", "speedup", "seconds", "status", "error")  # fmt: skip


def _write(place: Path, rows: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    table = [COLUMNS, ["---"] * len(COLUMNS), *([row.get(c) for c in COLUMNS] for row in rows)]
    lines = ["| " + " | ".join(map(cell, line)) + " |" for line in table]
    for name, text in (
        ("results.json", json.dumps(rows, indent=1)),
        ("results.md", "\n".join(lines)),
    ):
        with atomic_write(place / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
