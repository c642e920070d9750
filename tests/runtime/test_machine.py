# SPDX-License-Identifier: Apache-2.0
"""What of a machine a process may use."""

import os
import subprocess
import sys

import pytest

from zsq.runtime.machine import usable_cores, usable_memory
from zsq.runtime.shelf import half_of_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tell(root, cgroup, **limits):
    """Write what Linux says of a process's control groups; names of folders have ``__`` for slashes."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for place, text in limits.items():
        file = root / "sys" / "fs" / "cgroup" / place.replace("__", "/")
        file.mkdir(parents=True, exist_ok=True)
        name = "memory.limit_in_bytes" if place.startswith("memory") else "memory.max"
        (file / name).write_text(text)
    return root


@pytest.mark.parametrize(("cgroup", "limits", "expected"), [
    ("0::/\n", {"": "1000000\n"}, 1_000_000),  # a container that sees its own group as the outermost one
    ("0::/a/b\n", {"a": "5000000\n", "a__b": "max\n"}, 5_000_000),  # a limit on a group around it
    ("0::/a/b\n", {"a": "5000000\n", "a__b": "3000000\n"}, 3_000_000),
    ("0::/a\n", {"other": "7\n"}, MACHINE),
    ("0::/a\n", {"a": "max\n"}, MACHINE),
    ("3:cpu:/x\n9:memory:/x\n", {"memory__x": "2000000\n"}, 2_000_000),  # the older version
    ("9:memory:/x\n", {"memory__x": "9223372036854771712\n"}, MACHINE),  # which says unlimited so
    ("9:memory:/docker/1\n", {"memory": "4000000\n"}, 4_000_000),
])  # fmt: skip
def test_a_containers_limit_counts(tmp_path, cgroup, limits, expected):
    assert usable_memory(tell(tmp_path, cgroup, **limits)) == expected


def test_without_control_groups_it_is_the_machines(tmp_path):
    assert usable_memory(tmp_path) == MACHINE
    assert half_of_memory() == usable_memory() // 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call on this system")
def test_cores_are_those_that_the_process_may_use():
    script = (
        "import os; os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})\n"
        "from zsq.runtime.machine import usable_cores; print(usable_cores())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "1"
    assert usable_cores() == len(os.sched_getaffinity(0))
