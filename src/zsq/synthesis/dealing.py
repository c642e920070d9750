# SPDX-License-Identifier: Apache-2.0
"""Batches of images dealt out to the processes of a run, each made as if by a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from zsq.runtime.context import Context
from zsq.runtime.metrics import HeldRecords


def dealt(
    count: int,
    make: Callable[[int], dict[str, Tensor]],
    context: Context,
    *,
    in_order: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Yield pieces 0 to ``count - 1``, read from checkpoints or made, on all processes alike.

    Each process makes one piece at a time; then they tell each other. Process 0 keeps the pieces
    and what was recorded on the way.

    Args:
        count: of pieces.
        make: makes a piece; what it draws depends on the piece's index and on nothing else.
        context: its checkpoints, its records, its group.
        in_order: a piece depends on those before; then there is nothing to deal out.
    """
    group = context.group
    pieces = {index: context.checkpoints.load(_name(index)) for index in range(count)}
    missing = [index for index, piece in pieces.items() if piece is None]
    width = 1 if in_order else group.size
    for index in range(count):
        if missing and index == missing[0]:
            chunk, missing = missing[:width], missing[width:]
            mine = make(chunk[group.rank]) if group.rank < len(chunk) else None
            for owner, each in enumerate(chunk):
                pieces[each] = group.share(mine, source=owner)
                _collect(context, owner)
                context.checkpoints.save(_name(each), pieces[each] or {})
            context.flush()
        piece = pieces.pop(index)
        assert piece is not None
        yield piece


def _name(index: int) -> str:
    return f"synthesis_{index:03d}"


def _collect(context: Context, owner: int) -> None:
    """Let process 0 write what another one recorded."""
    if context.group.size == 1 or owner == 0:
        return
    metrics = context.metrics
    held = metrics.records if isinstance(metrics, HeldRecords) else []
    records = context.group.send(held, owner)
    if context.group.rank == 0 and metrics is not None:
        for record in records:
            metrics.write(**record)
