# SPDX-License-Identifier: Apache-2.0
"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re

from zsq.errors import UsageError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


#: Numbers without a unit below this were hardly meant as bytes.
LEAST = 1_000_000


def parse_memory(given: str | int) -> int:
    """Read an amount of memory in bytes.

    Args:
        given: bytes, or a number with ``KB``, ``MB``, ``GB`` (powers of 1,000), ``KiB``, ``MiB``,
            ``GiB``, or none if it is at least `LEAST`.

    Raises:
        UsageError: not an amount, or not positive.

    Example:
        >>> parse_memory("1.5GB"), parse_memory("2 GiB")
        (1500000000, 2147483648)
    """
    text = str(given)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    amount = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if found and found[2] is None and isinstance(given, str) and 0 < amount < LEAST:
        raise UsageError(f"--memory {text!r} has no unit; write for example {text.strip()}GB.")
    if amount <= 0:
        raise UsageError(f"--memory {text!r} is not an amount of memory; write for example 8GB.")
    return amount


def size(count: float) -> str:
    """Write a number of bytes for people.

    Example:
        >>> size(1_500_000)
        '1.50 MB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"
