# SPDX-License-Identifier: Apache-2.0
"""The fastest that this machine multiplies matrices: what a loop's speed is a share of."""

from __future__ import annotations

import time

import torch

#: Rows and columns of the matrices: large enough that nothing but multiplying takes time.
SIDES = {"cpu": 2048, "cuda": 8192}
#: Multiplications that are timed together on a GPU, so that starting them costs nothing.
TOGETHER = {"cpu": 1, "cuda": 10}


def matmul_peak(
    device: torch.device, dtype: torch.dtype, *, repeats: int = 5, side: int | None = None
) -> float:
    """Return the floating-point operations a second of a large square matrix product.

    Args:
        device: where.
        dtype: of both matrices. float32 on a GPU uses TF32 where convolutions there may.
        repeats: the best of so many counts.
        side: rows and columns; by default as `SIDES` says.

    Returns:
        Operations a second, two for each multiply-accumulate.
    """
    side = side or SIDES[device.type]
    together = TOGETHER[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    allowed = torch.backends.cuda.matmul.allow_tf32
    best = float("inf")
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        for _ in range(repeats + 1):  # the first one warms up, and is rarely the best
            synchronize(device)
            start = time.perf_counter()
            for _ in range(together):
                torch.mm(a, b, out=out)
            synchronize(device)
            best = min(best, (time.perf_counter() - start) / together)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2.0 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
