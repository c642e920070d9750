# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as functions of the step."""

import math
from collections.abc import Sequence


def cosine(step: int, steps: int) -> float:
    """Return the factor of a cosine decay from 1 to 0: ``(1 + cos(pi * step / steps)) / 2``.

    Example:
        >>> cosine(0, 10), round(cosine(5, 10), 3), round(cosine(10, 10), 3)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1.0 + math.cos(math.pi * step / max(steps, 1)))


def milestone_factor(done: float, milestones: Sequence[float], decay: float) -> float:
    """Return the factor of a stepwise decay.

    Args:
        done: share of the steps that are done.
        milestones: shares at which the factor falls.
        decay: by how much.

    Example:
        >>> milestone_factor(0.6, (0.25, 0.5, 0.75), 0.5)
        0.25
    """
    return decay ** sum(done >= milestone for milestone in milestones)
