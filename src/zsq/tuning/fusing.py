# SPDX-License-Identifier: Apache-2.0
"""One pass over memory where plain operations take seven: compiled rounding of activations.

On a GPU the whole student is compiled and this is part of it. On a CPU that takes minutes and gains
nothing on convolutions, while this one function, compiled once for all sizes, takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from zsq.quantizers.minmax import TrackedActivation, to_grid
from zsq.runtime.policy import Policy


@contextmanager
def fused_rounding(
    quantizers: Iterable[TrackedActivation], policy: Policy, steps: int, note: Callable[[str], None]
) -> Iterator[None]:
    """Let quantizers round through one compiled function inside the block.

    Args:
        quantizers: of the activations of a student that is tuned.
        policy: whether to compile.
        steps: of the loop; short ones do not repay it.
        note: told if compilation fails.
    """
    chosen = list(quantizers)
    if policy.device.type == "cpu" and policy.worth_compiling(steps):
        rounding = policy.compiled(to_grid, enabled=True, note=note, dynamic=True)
        for quantizer in chosen:
            quantizer.rounding = rounding
    try:
        yield
    finally:
        for quantizer in chosen:
            quantizer.rounding = to_grid
