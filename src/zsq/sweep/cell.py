# SPDX-License-Identifier: Apache-2.0
"""One cell of a sweep: `zsq quantize` and `zsq evaluate` as processes of their own, and their figures.

A cell that fails or is killed costs nothing but itself, and the same sweep started again does what is
missing. A cell that was made with other settings, another recipe or another network than the sweep now
says is refused by `zsq quantize --resume`, and fails: its numbers would be those of another sweep.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsq.runtime.machine import ENDS_WITH_PARENT
from zsq.sweep.sweepfile import Cell, Sweep


def run_cell(
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
