# SPDX-License-Identifier: Apache-2.0
"""The most memory that a loop held.

On a GPU: what PyTorch's allocator had given out, weights and images included. On a CPU: by how much
the process grew in resident memory since before the loop was built, at its largest; measured on
Linux only.
"""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What the kernel takes for "forget the highest resident size".
_FORGET_PEAK = "5"


class PeakMemory:
    """Watches one loop, from before it is built.

    Args:
        device: whose memory.

    Attributes:
        kind: what is measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "allocated on the GPU" if device.type == "cuda" else "growth of resident memory"
        if device.type == "cuda":  # statistics cannot be reset before
            torch.cuda.init()  # type: ignore[no-untyped-call]
        self.base = _resident("VmRSS") or 0
        self.restart()

    def restart(self) -> None:
        """Forget earlier peaks, such as a compiler's."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
        except OSError:  # then the peak includes what came before: more than it was, never less
            return

    def peak(self) -> int | None:
        """Return the largest number of bytes since `restart`; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        found = _resident("VmHWM")
        return None if found is None else max(0, found - self.base)


def _resident(field: str) -> int | None:
    """Return a field of the process's status in bytes."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 if values else None
