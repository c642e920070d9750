# SPDX-License-Identifier: Apache-2.0
"""Texts and tables in Markdown; names in them come from files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from zsq.errors import one_line


def plain(text: object) -> str:
    r"""Return a text in one line and with nothing in it that Markdown or a browser acts on.

    Example:
        >>> plain("a|b\n<script>")
        'a\\|b &lt;script&gt;'
    """
    return re.sub(r"([|\\`\[\]])", r"\\\1", escape(one_line(str(text)), quote=False))


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(plain, cells)) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]
