# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as functions of the step."""

import math


def cosine(step: int, steps: int) -> float:
    """Return the factor of a cosine decay from 1 to 0: ``(1 + cos(pi * step / steps)) / 2``.

    Example:
        >>> cosine(0, 10), round(cosine(5, 10), 3), round(cosine(10, 10), 3)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1.0 + math.cos(math.pi * step / max(steps, 1)))
