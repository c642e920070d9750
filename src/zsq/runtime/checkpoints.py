# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of a run (a batch of images, a unit's weights), so that a kill loses little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zsq.errors import RunError, UsageError
from zsq.runtime.files import atomic_write
from zsq.runtime.group import Group


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, object] | None = None
) -> None:
    """Write named tensors as safetensors, whole or not at all.

    Args:
        path: the file.
        tensors: any device; stored contiguous.
        metadata: stored in the header as one JSON text under ``zsq``.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(plain, temporary, metadata={"zsq": json.dumps(metadata or {})})


def load_tensors(
    path: Path, *, in_run: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what `save_tensors` wrote.

    Args:
        path: of the file.
        in_run: whether the run that it belongs to makes it again where it is missing; None: where there is a run
            around it.

    Raises:
        UsageError: the file is missing, truncated or not safetensors.
    """
    with _opened(path, in_run) as file:
        metadata = json.loads((file.metadata() or {}).get("zsq", "{}"))
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, metadata


def check_tensors(path: Path) -> None:
    """Open what `save_tensors` wrote and read no tensor; the header tells how long the file must be.

    Raises:
        UsageError: the file is missing, truncated or not safetensors.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path, in_run: bool | None = None) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if in_run is None:
            in_run = any((folder / "run.json").exists() for folder in path.absolute().parents[:2])
        advice = (
            "Delete it and run the same command with --resume to make it again."
            if in_run
            else "Give a file that zsq wrote, or the folder of the run that it is in."
        )
        raise UsageError(
            f"{path} cannot be read ({str(error)[:120]}); it is missing, truncated or not a "
            f"safetensors file. {advice}"
        ) from error


def flat(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several parts as ``part.name``."""
    return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return a part of what `flat` returned."""
    start = f"{part}."
    return {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}


class Checkpoints:
    """Named pieces of a run in a folder; without a folder nothing is kept.

    Args:
        folder: created when the first piece is saved.
        part: of a step, in front of the names of its pieces.
    """

    def __init__(self, folder: Path | None = None, part: str = "") -> None:
        self.folder, self.part = folder, part
        #: Whether the folder has, or had, a place: what is gone later is not made anew.
        self.placed = folder is not None and folder.parent.exists()

    def within(self, name: str) -> Checkpoints:
        """Return the checkpoints of a part of a step, whose pieces are not this step's."""
        inner = Checkpoints(self.folder, name)
        inner.placed = self.placed
        return inner

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return a piece that was saved before, or None."""
        path = self._path(name)
        return load_tensors(path, in_run=True)[0] if path is not None and path.exists() else None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a piece."""
        path = self._path(name)
        if path is not None:
            try:
                path.parent.mkdir(exist_ok=True, parents=not self.placed)
            except FileNotFoundError as error:
                raise RunError(
                    f"the folder {path.parent.parent} is gone, and what was made with it; run the command again."
                ) from error
            save_tensors(path, tensors)
            self.placed = True

    def _path(self, name: str) -> Path | None:
        file = f"{self.part} {name}.safetensors".strip()
        return None if self.folder is None else self.folder / file


class SharedCheckpoints(Checkpoints):
    """Checkpoints of a group: process 0 keeps them and tells the others, so no disk is shared.

    All processes load the same names in the same order.

    Args:
        folder: process 0's; None on the others, where saving does nothing.
        group: the processes.
        part: as of `Checkpoints`.
    """

    def __init__(self, folder: Path | None, group: Group, part: str = "") -> None:
        super().__init__(folder, part)
        self.group = group

    def within(self, name: str) -> Checkpoints:
        """Return the group's checkpoints of a part of a step."""
        return SharedCheckpoints(self.folder, self.group, name)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return a piece that process 0 saved before, or None."""
        piece = super().load(name)
        known = self.group.from_first(lambda: piece is not None)
        return self.group.share(piece) if known else None
