# SPDX-License-Identifier: Apache-2.0
"""What of a machine this process may use: a container or ``taskset`` may allow less than there is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

#: Name of the environment variable with the number of the process that another shall not outlive.
ENDS_WITH_PARENT = "ZSQ_ENDS_WITH_PARENT"
_PR_SET_PDEATHSIG = 1
#: What ``torchrun`` tells every process that it starts.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_one_of_several() -> bool:
    """Return whether ``torchrun`` started this process beside others."""
    return all(name in os.environ for name in _TORCHRUN) and os.environ["WORLD_SIZE"] != "1"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Have this process end when the one that started it does, if that asked for it by `ENDS_WITH_PARENT`.

    On Linux; elsewhere a process that is orphaned goes on.
    """
    if ENDS_WITH_PARENT not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = os.environ.pop(ENDS_WITH_PARENT)  # what this process starts has another
    if str(os.getppid()) != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


def usable_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: the machine's, or what its container allows.

    Args:
        root: of the file system that Linux tells of containers in (``proc/self/cgroup``, ``sys/fs/cgroup``).
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_container_limits(root)])


def _container_limits(root: Path) -> Iterator[int]:
    """Yield every limit in bytes on a control group of this process, of either version of these."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for group in groups:
        _, kinds, path = group.split(":", 2)
        if kinds == "":
            base, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in kinds.split(","):
            base, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        place = base / path.lstrip("/")
        # what limits a group limits those in it; a container may see its own as the outermost one
        for folder in {base, place, *(p for p in place.parents if base in p.parents)}:
            try:
                text = (folder / file).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdigit():  # and not "max"
                yield int(text)
