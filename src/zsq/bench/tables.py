# SPDX-License-Identifier: Apache-2.0
"""Measurements as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from zsq.tables import new_table, size

#: Precisions as the command line names them.
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def bench_tables(found: dict[str, Any]) -> Iterable[RenderableType]:
    """Show what `zsq.bench.run.bench` measured."""
    loops = found["loops"]
    plain = any("plain" in row for row in loops)
    table = new_table(
        f"{escape(found['model'])} on {escape(found['device'])}", "loop", "precision", "batch",
        "ms a step", "images/s", "of peak", "bare ms", "to bare", *(["plain ms", "faster"] * plain),
        "memory",
    )  # fmt: skip
    for row in loops:
        table.add_row(*_cells(row, plain))
    yield table
    yield from (_blocks(row) for row in loops if "parts" in row)
    for row in {row["memory_kind"]: row for row in loops}.values():
        yield (
            f"{row['threads']} thread(s); peak: a matrix product in the loop's precision, "
            f"{_speeds(loops)}; memory: {row['memory_kind']}."
        )
    if "growth" in found:
        yield _growth(found["growth"])


def _cells(row: dict[str, Any], plain: bool) -> list[str]:
    memory = row["peak_memory_bytes"]
    cells = [
        row["loop"], SHORT[row["precision"]] + (", compiled" if row["compiled"] else ""),
        str(row["batch"]), _ms(row["seconds"]), f"{row['images_per_second']:.4g}",
        f"{100 * row['share_of_peak']:.1f} %", _ms(row["bare"]["seconds"]),
        f"{row['ratio_to_bare']:.2f}x",
    ]  # fmt: skip
    if plain:
        cells += [_ms(row["plain"]["seconds"]), f"{row['speedup_over_plain']:.2f}x"]
    return [*cells, "" if memory is None else size(memory)]


def _speeds(loops: list[dict[str, Any]]) -> str:
    peaks = {row["precision"]: row["matmul_peak"] for row in loops}
    return ", ".join(f"{SHORT[name]} {value / 1e12:.3g} TFLOP/s" for name, value in peaks.items())


def _blocks(row: dict[str, Any]) -> RenderableType:
    table = new_table(f"{row['loop']}, block by block", "block", "ms a step", "bare ms", "to bare")
    for part in row["parts"]:
        table.add_row(
            escape(part["name"]), _ms(part["seconds"]), _ms(part["bare"]["seconds"]),
            f"{part['ratio_to_bare']:.2f}x",
        )  # fmt: skip
    return table


def _growth(points: list[dict[str, Any]]) -> RenderableType:
    table = new_table(
        "growth", "loop", "along", "size", "parameters", "ms a step", "images/s", "whole schedule",
        "memory",
    )  # fmt: skip
    for point in points:
        place = [point["loop"], point["along"], escape(point["size"])]
        if "error" in point:
            table.add_row(*place, "", escape(point["error"]))
            continue
        memory = point["peak_memory_bytes"]
        table.add_row(
            *place, f"{point['parameters']:,}", _ms(point["seconds"]),
            f"{point['images_per_second']:.4g}", f"{point['schedule_seconds'] / 60:.1f} min",
            "" if memory is None else size(memory),
        )  # fmt: skip
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"
