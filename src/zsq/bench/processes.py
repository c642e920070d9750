# SPDX-License-Identifier: Apache-2.0
"""A measurement in a process of its own, so that one loop's memory is not another's.

``python -m zsq.bench.processes`` reads a request as JSON from stdin and answers in JSON on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from zsq.bench.measure import Request, measure
from zsq.errors import RunError, UsageError, ZsqError


def measure_apart(request: Request, note: Callable[[str], None]) -> dict[str, Any]:
    """Measure one loop in a new process; see `zsq.bench.measure.measure`.

    Raises:
        UsageError: nothing can be measured like this.
        RunError: the process failed, or was killed for memory.
    """
    done = subprocess.run(
        [sys.executable, "-m", "zsq.bench.processes"], input=json.dumps(asdict(request)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise RunError(_complaint(request, done))
    answer = json.loads(lines[-1])
    for message in answer["notes"]:
        note(message)
    if "error" in answer:
        raise (UsageError if answer["usage"] else RunError)(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result


def _complaint(request: Request, done: subprocess.CompletedProcess[str]) -> str:
    where = f"measuring {request.loop} of {request.model} (batch {request.batch or 'as published'})"
    if done.returncode < 0:
        return (
            f"{where} was ended by signal {-done.returncode}, most often for want of memory; try a "
            "smaller --batch."
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"{where} failed: {lines[-1] if lines else f'exit code {done.returncode}'}"


def _answer(text: str) -> dict[str, Any]:
    """Do what a request asks; return the result, or what is wrong."""
    notes: list[str] = []
    data = json.loads(text)
    if data["input_shape"] is not None:
        data["input_shape"] = tuple(data["input_shape"])
    try:
        return {"result": measure(Request(**data), notes.append), "notes": notes}
    except ZsqError as error:
        return {"error": str(error), "usage": isinstance(error, UsageError), "notes": notes}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(sys.stdin.read())) + "\n")
