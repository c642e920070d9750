# SPDX-License-Identifier: Apache-2.0
"""Joining the processes that ``torchrun`` started, and leaving them, in good times and bad."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zsq.errors import RunError, ToldError, UsageError, ZsqError
from zsq.runtime.group import Group
from zsq.runtime.machine import is_one_of_several

#: The longest that one process waits for another, which may be busy with images, an export or a
#: report. A death is noticed at once, by ``torchrun``; this is for what nobody notices.
TIMEOUT = timedelta(hours=12)
#: What a command exits with after Ctrl-C.
INTERRUPTED = 130


@contextmanager
def joined(device: str, tell: Callable[[ZsqError], None]) -> Iterator[Group]:
    """Join the group of processes that ``torchrun`` started; alone where there is none.

    CPUs talk through gloo, GPUs through NCCL. An error ends the run on all processes and is shown by
    the first that meets one.

    Args:
        device: ``cpu``, or ``cuda``: each process then takes the GPU of its number on its machine.
        tell: shows an error; called by one process.

    Yields:
        The group; the process group is destroyed at the end.

    Raises:
        ToldError: in place of an error that was shown.
        UsageError: a certain GPU was asked for, for several processes.
    """
    if not is_one_of_several():
        yield Group(device=device)
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    local = int(os.environ["LOCAL_RANK"])
    with _told_once(store, rank, tell):
        group = Group(rank, size, _own_device(device, local), local)
    # told before the group is left: that is what the others notice, and they shall not speak first
    with _process_group(group, store), _told_once(store, rank, tell), _stopped_by_an_error():
        yield group
        group.barrier()  # process 0 is still writing: leave together


@contextmanager
def _told_once(store: Store, rank: int, tell: Callable[[ZsqError], None]) -> Iterator[None]:
    """Let the first process that meets an error in the block tell it, and the others end silently."""
    try:
        yield
    except KeyboardInterrupt:
        if _first_error(store, rank, INTERRUPTED)[0] != rank:
            raise ToldError(INTERRUPTED) from None
        raise
    except ZsqError as error:
        first, exit_code = _first_error(store, rank, error.exit_code)
        if first == rank:
            tell(error)
        raise ToldError(exit_code) from error


def _first_error(store: Store, rank: int, exit_code: int) -> tuple[int, int]:
    """Note an error; return the rank of the process that was the first to meet one, and its exit code."""
    mine = f"{rank} {exit_code}"
    try:  # set where nothing is set yet, in one go
        known = store.compare_set("zsq/error", "", mine).decode()
    except RuntimeError:  # whoever kept the store is gone: better told twice than never
        known = mine
    first, code = known.split()
    return int(first), int(code)


def _own_device(device: str, local_rank: int) -> str:
    if device == "cpu":
        return device
    if device != "cuda":
        raise UsageError(
            f"device {device!r} is one for several processes; with torchrun use --device cuda, and each "
            "takes a GPU of its own, or --device cpu."
        )
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {local_rank} of this machine has no GPU: PyTorch sees {torch.cuda.device_count()}. "
            "Start as many processes as there are GPUs (torchrun --nproc-per-node), or use --device cpu."
        )
    return f"cuda:{local_rank}"


@contextmanager
def _process_group(group: Group, store: Store) -> Iterator[None]:
    """Have a process group for the length of the block."""
    cuda = group.device != "cpu"
    with torch.cuda.device(group.device) if cuda else nullcontext():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=PrefixStore("zsq", store),
            rank=group.rank, world_size=group.size, timeout=TIMEOUT,
        )  # fmt: skip
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _stopped_by_an_error() -> Iterator[None]:
    """Let SIGTERM, which ``torchrun`` sends when another process has died, end the block by an error."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise RunError(
            "the run was stopped because one of its processes died, or from outside (SIGTERM). Repeat "
            "the command with --resume; the number of processes may change."
        )

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
