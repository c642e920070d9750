# SPDX-License-Identifier: Apache-2.0
"""The fastest that this machine multiplies matrices: what a loop's speed is a share of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from zsq.runtime.policy import synchronize

#: Rows and columns of the matrices: large enough that nothing but multiplying takes time.
SIDES = {"cpu": 2048, "cuda": 8192}
#: Multiplications that are timed together on a GPU, so that starting them costs nothing.
TOGETHER = {"cpu": 1, "cuda": 10}
#: Of the convolution that is timed on a CPU: many, so that it computes more than it reads.
CHANNELS = 256


def matmul_peak(
    device: torch.device, dtype: torch.dtype, *, repeats: int = 5, side: int | None = None
) -> float:
    """Return the floating-point operations a second of a large matrix product.

    On a CPU a product and a convolution, which is one too, come from different libraries, and which is
    faster depends on the processor; the better one counts.

    Args:
        device: where.
        dtype: of the factors.
        repeats: the best of so many counts.
        side: rows and columns; by default as `SIDES` says.

    Returns:
        Operations a second, two for each multiply-accumulate.
    """
    side = side or SIDES[device.type]
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "ieee"  # as convolutions are, see `zsq.runtime.ambient`
        return max(
            2.0 * count / _best(multiply, device, repeats)
            for count, multiply in _products(device, dtype, side)
        )
    finally:
        products.fp32_precision = before


def _products(
    device: torch.device, dtype: torch.dtype, side: int
) -> list[tuple[int, Callable[[], torch.Tensor]]]:
    """Return what is timed, about as much of each, with its multiply-accumulates."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    found: list[tuple[int, Callable[[], torch.Tensor]]] = [
        (side**3, lambda: torch.mm(a, b, out=out))
    ]
    if device.type == "cpu":
        pixels = math.ceil(math.sqrt(side**3 / (9 * CHANNELS**2)))
        image = torch.randn(1, CHANNELS, pixels, pixels).to(dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(CHANNELS, CHANNELS, 3, 3).to(dtype)
        taps = (3 * pixels - 2) ** 2  # over all places; what falls on the padding is no product
        found.append((taps * CHANNELS**2, lambda: torch.conv2d(image, weight, padding=1)))
    return found


def _best(multiply: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> float:
    """Return the seconds of one product."""
    together = TOGETHER[device.type]
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up, and is rarely the best
        synchronize(device)
        start = time.perf_counter()
        for _ in range(together):
            multiply()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / together)
    return best
