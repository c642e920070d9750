# SPDX-License-Identifier: Apache-2.0
"""Batches of tensors that are too large for a GPU or for the memory, made ready while others compute."""

from __future__ import annotations

import math
from threading import Thread

import torch
from torch import Tensor

#: Buffers that take turns: one is filled while the last one's copy is under way.
BUFFERS = 2
#: Elements, four bytes each, between two that are read so that the system has their pages in memory.
STRIDE = 1024


class Fetcher:
    """Takes rows of one tensor to a device.

    Where the tensor lies there already it is indexed. From the host to a GPU, rows are gathered into
    page-locked buffers and copied from them, so that the host, which runs steps ahead, waits for neither
    the copy nor the computation. (Rows gathered into ordinary memory would be copied once more.)
    Rows of a tensor that lies in a file can be read ahead.

    Args:
        source: (N, ...), where it stays.
        rows: most rows that are fetched at a time.
        device: where to.
    """

    def __init__(self, source: Tensor, rows: int, device: torch.device) -> None:
        self.source, self.device = source, device
        self.in_file = source.untyped_storage().filename is not None
        self.reader: Thread | None = None
        self.turn = 0
        self.buffers: list[Tensor] = []
        self.copied: list[torch.cuda.Event] = []
        if device.type == "cuda" and source.device.type == "cpu":
            self.buffers = [_pinned(source[:1], rows) for _ in range(BUFFERS)]
            self.copied = [torch.cuda.Event() for _ in range(BUFFERS)]  # type: ignore[no-untyped-call]

    def read_ahead(self, indices: Tensor) -> None:
        """Have rows that will be fetched next read from their file meanwhile; does nothing elsewhere.

        Args:
            indices: (B,) int64 on the CPU.
        """
        busy = self.reader is not None and self.reader.is_alive()
        if self.in_file and not busy:
            self.reader = Thread(target=_touch, args=(self.source, indices), daemon=True)
            self.reader.start()

    def fetch(self, indices: Tensor) -> Tensor:
        """Return rows on the device.

        Args:
            indices: (B,) int64 on the CPU, at most ``rows``.
        """
        if not self.buffers:
            chosen = self.source[indices.to(self.source.device, non_blocking=True)]
            return chosen.to(self.device)
        self.turn = (self.turn + 1) % BUFFERS
        self.copied[self.turn].synchronize()  # of two fetches ago
        gathered = self.buffers[self.turn][: len(indices)]
        torch.index_select(self.source, 0, indices, out=gathered)
        fetched = gathered.to(self.device, non_blocking=True)
        self.copied[self.turn].record(torch.cuda.current_stream(self.device))
        return fetched


def _touch(source: Tensor, indices: Tensor) -> None:
    """Read an element of every page of some rows: a copy of the rows themselves would take a core."""
    pages = math.ceil(source[0].numel() / STRIDE)
    for index in indices.tolist():
        row = source[index]
        row.as_strided((pages,), (STRIDE,), row.storage_offset()).sum()
        row.as_strided((1,), (1,), row.storage_offset() + row.numel() - 1).sum()


def _pinned(row: Tensor, rows: int) -> Tensor:
    """Return an uninitialised page-locked tensor of so many rows, in the memory order of ``row``."""
    shape = (rows, *row.shape[1:])
    if row.ndim == 4:
        return torch.empty(shape, pin_memory=True, memory_format=torch.channels_last)
    return torch.empty(shape, pin_memory=True)
