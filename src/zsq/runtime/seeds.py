# SPDX-License-Identifier: Apache-2.0
"""Seeds derived from names, so that a resumed run draws the same numbers as an uninterrupted one.

A step that needs chance asks for the stream of its own name, ``seeded(seed, "synthesis", 3)``,
instead of going on with a global generator: what it draws then depends on nothing that ran before.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import SupportsIndex

import torch

from zsq.errors import UsageError


def whole_seed(seed: SupportsIndex) -> int:
    """Return a seed as a Python integer, whichever library's integer it is.

    Raises:
        UsageError: it is no whole number.
    """
    try:
        return operator.index(seed)
    except TypeError as error:
        raise UsageError(
            f"seed={seed!r} is no whole number; give one, such as 0: the same seed gives the same result."
        ) from error


def derive_seed(*parts: int | str) -> int:
    """Hash ``parts`` into a seed in ``[0, 2**63)``.

    The value depends on the parts, their order and their types, and on nothing else: not on the
    machine, the version of Python or ``PYTHONHASHSEED``.

    Args:
        *parts: for example the user's seed, the name of the stage, the number of the batch.

    Returns:
        The seed.

    Example:
        >>> derive_seed(0, "synthesis", 3)
        1641097099287622755
        >>> derive_seed(0, "synthesis", 3) == derive_seed(0, "synthesis", 4)
        False
    """
    # JSON tells 1 from "1" and ("ab", "c") from ("a", "bc"), and is the same everywhere.
    text = json.dumps(parts, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Run the block with torch's generators (CPU and every CUDA device) seeded from ``parts``.

    Afterwards, also after an error, the generators go on where they were before the block. Only
    torch's generators are set: code in zsq draws from nothing else.

    Args:
        *parts: what :func:`derive_seed` hashes.

    Yields:
        Nothing.

    Example:
        >>> with seeded(0, "latents"):
        ...     first = torch.randn(4)
        >>> with seeded(0, "latents"):
        ...     second = torch.randn(4)
        >>> torch.equal(first, second)
        True
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(derive_seed(*parts))
        yield
