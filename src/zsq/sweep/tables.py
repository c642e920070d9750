# SPDX-License-Identifier: Apache-2.0
"""A sweep's table: in its folder, and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from zsq.markdown import markdown_table
from zsq.runtime.files import atomic_write
from zsq.tables import new_table

#: Columns of the table.
COLUMNS = ("model", "recipe", "protocol", "bits", "seed", "teacher", "student", "drop", "stderr", "agreement",
           "onnx", "ratio", "speedup", "seconds", "status", "error")  # fmt: skip


def write_results(place: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``results.json`` and ``results.md`` of the cells that are done."""

    def cell(value: Any) -> object:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value

    lines = markdown_table(COLUMNS, ([cell(row.get(c)) for c in COLUMNS] for row in rows))
    for name, text in (
        ("results.json", json.dumps(rows, indent=1)),
        ("results.md", "\n".join(lines)),
    ):
        with atomic_write(place / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def sweep_tables(rows: list[dict[str, Any]]) -> Iterable[RenderableType]:
    """Show a sweep's cells."""
    table = new_table(
        "sweep", "model", "recipe", "bits", "status", "seed", "top-1 %", "drop", "smaller", texts=4
    )  # fmt: skip
    for row in rows:
        shown = [row.get(key) for key in ("student", "drop", "ratio")]
        cells = ["" if value is None else f"{value:.2f}" for value in shown]
        recipe = escape(row["recipe"])
        if row.get("protocol"):  # figures of two protocols do not compare
            recipe = f"{recipe}\n[dim]{escape(row['protocol'])}[/]"
        table.add_row(
            escape(row["model"]),
            recipe,
            escape(row["bits"]),
            row["status"],
            str(row["seed"]),
            *cells,
        )
    yield table
    failed = [row for row in rows if row["status"] != "done"]
    if failed:
        yield f"{len(failed)} of {len(rows)} cells failed:"
        yield from (escape(f"{row['folder']}: {row['error']}") for row in failed)
