# SPDX-License-Identifier: Apache-2.0
"""Metrics over time: one JSON object a line, appended as a run goes on.

A resumed run repeats the steps since its last checkpoint, so a step can occur twice; the later
record is the one that counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from zsq.errors import RunError, UsageError

#: What a record may hold: plain values, or numbers by name (of a layer, say).
Value = float | str | bool | None | dict[str, float]


class Records(Protocol):
    """What takes records of values over time."""

    def write(self, *, stage: str, step: int, **values: Value) -> None:
        """Take one record."""

    def flush(self) -> None:
        """Let go of what was taken; called at checkpoints."""


class HeldRecords:
    """Records of a process that writes no files, held until they are sent or the next checkpoint.

    Example:
        >>> held = HeldRecords()
        >>> held.write(stage="synthesis", step=100, loss=0.25)
        >>> held.records
        [{'stage': 'synthesis', 'step': 100, 'loss': 0.25}]
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, *, stage: str, step: int, **values: Value) -> None:
        """Hold one record."""
        self.records.append({"stage": stage, "step": step, **values})

    def flush(self) -> None:
        """Forget what was not sent: it is known to the process that writes."""
        self.records.clear()


class MetricsLog:
    """Appends records to a file of JSON lines.

    Records are buffered: call :meth:`flush` at checkpoints, and :meth:`close` (or leave the
    ``with`` block) at the end. A kill in the middle of a line costs that line only: opening the
    file again removes it.

    Args:
        path: the file; created when it does not exist, continued when it does.

    Raises:
        RunError: the file cannot be opened or written.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsLog(path) as log:
        ...     log.write(stage="synthesis", step=100, loss=0.25)
        >>> record = read_metrics(path)[0]
        >>> record["stage"], record["step"], record["loss"]
        ('synthesis', 100, 0.25)
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        try:
            _truncate_torn_line(self._path)
            self._file = self._path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._failure(error) from error

    def write(self, *, stage: str, step: int, **values: Value) -> None:
        """Append one record, with the time (seconds since 1970) in front.

        Args:
            stage: which part of the run, for example ``"synthesis"``.
            step: the step within the stage.
            **values: what was measured, as Python numbers (fetching one from a device waits for the
                device, so do it once in many steps). A number that is not finite is written as
                ``null``, because JSON has no NaN.

        Raises:
            RunError: the disk is full.
        """
        record = {"time": round(time.time(), 3), "stage": stage, "step": step, **values}
        finite = {name: _finite(value) for name, value in record.items()}
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Hand every record written so far to the operating system.

        Raises:
            RunError: the disk is full.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Flush and close the file; closing it again does nothing.

        Raises:
            RunError: the disk is full.
        """
        try:
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> MetricsLog:
        """Return the log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file. A failure to do so never hides the error that ended the block."""
        with contextlib.suppress(RunError) if error else contextlib.nullcontext():
            self.close()

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write {self._path}: {error.strerror or error}. Free some space or make the "
            "folder writable, then run the same command with --resume."
        )


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read every record of a file that :class:`MetricsLog` wrote.

    Args:
        path: the file; it may still be growing.

    Returns:
        The records in the order in which they were written. A torn last line is left out.

    Raises:
        UsageError: the file cannot be read, or a line before the last is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(
            f"cannot read the metrics {path}: {error.strerror or error}. "
            "Give the folder of a run that zsq wrote."
        ) from error
    # What follows the last end of line is nothing, or a line that is being written.
    return [_parse(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


def _parse(line: bytes, path: Path | str, number: int) -> dict[str, Any]:
    """Read one line."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UsageError(
            f"line {number} of {path} is not a JSON object: the file is damaged. Remove that line, "
            "or remove the file: it holds the course of the run and no result."
        )
    return record


def _finite(value: object) -> object:
    """Replace NaN and infinity, which JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate_torn_line(path: Path) -> None:
    """Cut off what follows the last end of line, if anything."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = end
        while kept > 0:
            start = max(0, kept - 4096)
            file.seek(start)
            newline = file.read(kept - start).rfind(b"\n")
            kept = start + newline + 1
            if newline >= 0:
                break
        if kept < end:
            file.truncate(kept)
