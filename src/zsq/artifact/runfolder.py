# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what it was, how far it is, and what it left.

====================  ==========================================================
``run.json``          what was asked for, the machine, timings, results, status
``recipe.yaml``       the resolved recipe
``metrics.jsonl``     losses over time
``images.safetensors``  the images, with labels and provenance
``teacher.safetensors`` the float network, so that the run can be judged alone
``equalization.safetensors`` what channels were multiplied by, where it was learned
``student.safetensors`` the quantized network as packed integers
``model.onnx``        the deployable file
``diagnosis.json``    what each weight and edge costs
``report.html``       everything for a reader; ``report.md`` is its summary
``checkpoints/``      finished pieces; gone when the run is done
====================  ==========================================================
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from zsq.errors import UsageError
from zsq.runtime.environment import environment
from zsq.runtime.files import (
    atomic_write,
    is_leftover,
    is_writable,
    lock_folder,
    make_folder,
    remove_leftovers,
    unlock_folder,
)

FORMAT = 1
#: What runs of earlier versions did not note of themselves.
LATER = ("input_shape", "mean", "std")


class RunFolder:
    """A run's folder; `RunFolder.start` or `RunFolder.open` make one.

    Attributes:
        path: where it is.
        record: what ``run.json`` says.
        begun: by this object, so that nothing in it is older.
        lock: from `zsq.runtime.files.lock_folder`, while this object works on the run.
    """

    lock: int | None = None

    def __init__(self, path: Path, record: dict[str, Any], *, begun: bool = False) -> None:
        self.path = path
        self.record = record
        self.begun = begun

    @classmethod
    def start(cls, path: Path | str, identity: dict[str, Any], *, resume: bool) -> RunFolder:
        """Begin a run in a folder, or go on with the one it holds.

        What a killed process left half written is deleted. Until `release`, or the end of this process, no
        other may work on the run.

        Args:
            path: created where missing.
            identity: everything that decides the result; must be that of the run being resumed.
            resume: go on with an unfinished run.

        Raises:
            UsageError: the folder holds another run, or something else, or cannot be made, or another process
                works on it.
        """
        path = Path(path)
        if (path / "run.json").exists():
            folder = cls.open(path)
            lock = lock_folder(path)  # of a run that is being made this is what to say
            try:
                folder.record = cls.open(path).record  # as the last process to hold it left it
                folder._check_same(identity, resume)
            except UsageError:
                unlock_folder(lock)
                raise
            folder.lock = lock
            for place in (path, folder.file("checkpoints")):
                remove_leftovers(place)
            return folder
        if path.exists() and (
            not path.is_dir() or not all(is_leftover(found) for found in path.iterdir())
        ):
            raise UsageError(
                f"{path} is not an empty folder and holds no zsq run; choose another folder with -o, "
                "nothing in this one was touched."
            )
        make_folder(path)
        lock = lock_folder(path)
        remove_leftovers(path)
        folder = cls(path, {
            "format": FORMAT, "status": "running", "identity": identity,
            "environment": environment(), "timings": {}, "results": {},
        }, begun=True)  # fmt: skip
        folder.lock = lock
        try:
            folder.save()
        except BaseException:
            folder.release()
            raise
        return folder

    def is_writable(self) -> bool:
        """Return whether files can be added to the run; those of others, on a read-only disk, can only be read."""
        return is_writable(self.path)

    def release(self) -> None:
        """Let other processes work on the run."""
        unlock_folder(self.lock)
        self.lock = None

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open an existing run.

        Raises:
            UsageError: the folder holds no readable run.
        """
        path = Path(path)
        try:
            record = json.loads((path / "run.json").read_text(encoding="utf-8-sig"))
            linked = sorted(found for found in path.rglob("*") if found.is_symlink())
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} is not a readable zsq run ({type(error).__name__}: run.json); give the folder that "
                "`zsq quantize -o` wrote."
            ) from error
        if linked:  # commands would write, and reports show, what lies elsewhere
            raise UsageError(
                f"{linked[0]} is a link; a run's files are its own. If you trust what it points to, copy the run "
                f"with it in its place (cp -rL {path} COPY) and give the copy, or take the link away."
            )
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UsageError(
                f"{path}/run.json is not of format {FORMAT}; it is damaged or of another zsq."
            )
        if not _is_whole(record):
            raise UsageError(
                f"{path}/run.json is damaged: it does not say which model and recipe the run is of, how "
                "long it took, or what came out; repeat the run in another folder."
            )
        return cls(path, record)

    def _check_same(self, identity: dict[str, Any], resume: bool) -> None:
        before = dict(self.record.get("identity") or {})
        if "network" in before:  # which says more than how someone spelled where it is from
            before["model"] = identity.get("model")
        noted = {key: now for key, now in identity.items() if key in before or key not in LATER}
        different = differences(before, noted)
        if different:
            raise UsageError(
                f"{self.path} holds another run: {'; '.join(different[:3])}. Choose another folder with -o, "
                "or repeat the command it was started with."
            )
        if not resume:
            raise UsageError(
                f"{self.path} holds this run already ({self.record.get('status')}); add --resume to go on "
                "with it, or choose another folder with -o."
            )

    def save(self) -> None:
        """Write ``run.json``."""
        with atomic_write(self.path / "run.json") as temporary:
            temporary.write_text(
                json.dumps(self.record, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the folder."""
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def note_time(self, stage: str, seconds: float) -> None:
        """Add to a stage's time (a resumed run adds to what was spent before)."""
        timings = self.record["timings"]
        timings[stage] = round(timings.get(stage, 0.0) + seconds, 3)

    def finish(self) -> None:
        """Mark the run as done and drop its checkpoints."""
        self.record["status"] = "done"
        self.save()
        shutil.rmtree(self.file("checkpoints"), ignore_errors=True)

    def withdraw(self) -> None:
        """Empty the folder of a run that this object began and that has made nothing yet."""
        beginnings = {"run.json", "recipe.yaml", "teacher.safetensors", "metrics.jsonl"}
        with suppress(OSError):  # somebody may have deleted it, and what went wrong is to be seen
            found = list(self.path.iterdir())
            if self.begun and {file.name for file in found} <= beginnings:
                for file in found:
                    file.unlink()

    def file(self, name: str) -> Path:
        """Return the path of one of the folder's files."""
        return self.path / name

    def require(self, name: str) -> Path:
        """Return the path of a file that must be there.

        Raises:
            UsageError: the run is not that far.
        """
        path = self.file(name)
        if not path.exists():
            raise UsageError(
                f"{self.path} has no {name} (status: {self.record.get('status')}); finish the run with its "
                "own command and --resume."
            )
        return path


def _is_whole(record: dict[str, Any]) -> bool:
    """Tell whether a record has what every command reads of it."""
    parts = [record.get(key) for key in ("identity", "environment", "timings", "results")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    identity = record["identity"]
    return isinstance(identity.get("model"), str) and isinstance(identity.get("recipe"), dict)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Name the settings in which two identities differ."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found
