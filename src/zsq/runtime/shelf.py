# SPDX-License-Identifier: Apache-2.0
"""Room for tensors that hold something for every image: in memory, or in files beyond a budget."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from zsq.errors import RunError
from zsq.runtime.amounts import size
from zsq.runtime.machine import usable_memory
from zsq.runtime.policy import Policy

#: Tensors of a boundary's size that are alive at once: inputs of teacher and student, the target,
#: and the student's next inputs.
ALIVE = 4


def half_of_memory() -> int:
    """Return half of the memory in bytes that there is for this process: what caches may take unless told otherwise."""
    return usable_memory() // 2


def host_budget(policy: Policy) -> int:
    """Return the bytes of the host's memory that this process's caches may take.

    Processes that `torchrun` started on one machine share what the run may take there.
    """
    whole = half_of_memory() if policy.memory is None else policy.memory
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def room_for_work(policy: Policy) -> int:
    """Return the bytes that one step may keep: most of a GPU's free memory, or the host's budget."""
    if policy.device.type == "cuda":
        return int(0.9 * free_memory(policy.device))
    return host_budget(policy)


def free_memory(device: torch.device) -> int:
    """Return a GPU's free bytes, with those that PyTorch keeps for itself and does not use."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(kept)


@dataclass(frozen=True)
class Shelf:
    """Gives room for tensors over all images of a set.

    Attributes:
        budget: bytes that all of them together may take in memory.
        folder: where files lie that hold the others; the system's temporary folder if None.
    """

    budget: int = field(default_factory=half_of_memory)
    folder: Path | None = None

    def in_files(self, shape: Sequence[int]) -> bool:
        """Return whether a float32 tensor of this shape goes into a file."""
        return ALIVE * 4 * math.prod(shape) > self.budget

    def room(self, shape: Sequence[int]) -> Tensor:
        """Return an uninitialised float32 tensor on the CPU, images and maps with channels last.

        A tensor in a file behaves like any other; the system reads and writes its pages as needed.
        The file has no name any more, so that nothing is left behind, whatever happens.

        Raises:
            RunError: the disk is too full.
        """
        order = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)
        # not page-locked: PyTorch rounds such memory up to powers of two and keeps it, and batches go
        # to a GPU through buffers of their own (`zsq.runtime.fetching`)
        count = math.prod(shape)
        flat = self._file(count) if self.in_files(shape) else torch.empty(count)
        tensor = flat.view(order)
        return tensor.permute(0, 3, 1, 2) if len(shape) == 4 else tensor

    def _file(self, count: int) -> Tensor:
        folder = self.folder or Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".zsq-", suffix=".cache", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is found here, not in mid-run
                os.posix_fallocate(handle, 0, 4 * count)
            else:  # macOS
                os.truncate(handle, 4 * count)
            return torch.from_file(name, shared=True, size=count, dtype=torch.float32)
        except OSError as error:
            raise RunError(
                f"{size(4 * count)} of block inputs do not fit the disk of {folder} "
                f"({error.strerror}). Free some space, allow more --memory, or take fewer images with "
                "--set synthesis.images=N; then run the same command with --resume."
            ) from error
        finally:
            os.close(handle)
            Path(name).unlink(missing_ok=True)


def describe(shelf: Shelf, shapes: Sequence[Sequence[int]], parts: int = 0) -> str:
    """Say how much the boundaries of a network's pieces take, before they are computed.

    Args:
        shelf: will hold them.
        shapes: of each boundary, images first, in order.
        parts: most bytes beside them of what is tuned a part, or a layer, at a time.

    Returns:
        One sentence.

    Example:
        >>> describe(Shelf(10**6), [(64, 3, 8, 8), (64, 16, 32, 32)])
        'block inputs take up to 8.44 MB (--memory 1.00 MB); 1 of 2 boundaries lie in files'
    """
    sizes = [4 * math.prod(shape) for shape in shapes]
    most = max((max(2 * i + o, i + 2 * o) for i, o in pairwise(sizes)), default=ALIVE * sum(sizes))
    most = max(most, parts)
    filed = sum(shelf.in_files(shape) for shape in shapes)
    where = f"{filed} of {len(shapes)} boundaries lie in files" if filed else "all in memory"
    if parts > shelf.budget:
        where = f"{where}, those inside of parts in files as far as they do not fit"
    return f"block inputs take up to {size(most)} (--memory {size(shelf.budget)}); {where}"
