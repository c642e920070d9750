# SPDX-License-Identifier: Apache-2.0
"""Measurements as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from zsq.runtime.amounts import size
from zsq.tables import new_table

#: Precisions as the command line names them.
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def bench_tables(found: dict[str, Any]) -> Iterable[RenderableType]:
    """Show what `zsq.bench.run.bench` measured: a column a loop, then blocks, then curves."""
    loops = found["loops"]
    title = f"{escape(found['model'])} on {escape(found['device'])}"
    table = new_table(title, "", *(row["loop"] for row in loops))
    columns = [_figures(row) for row in loops]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    yield table
    yield from (_blocks(row) for row in loops if "parts" in row)
    yield (
        f"{loops[0]['threads']} thread(s). Peak: a matrix product in the loop's precision, "
        f"{_speeds(loops)}. Memory: {loops[0]['memory_kind']}."
    )
    points = found.get("growth", [])
    for along in dict.fromkeys(point["along"] for point in points):
        yield from _growth(along, [point for point in points if point["along"] == along])


def _figures(row: dict[str, Any]) -> dict[str, str]:
    """Return a loop's figures by their names."""
    bare, plain = row["bare"], row.get("plain")
    figures = {
        "precision": SHORT[row["precision"]] + (", compiled" if row["compiled"] else ""),
        "batch": str(row["batch"]),
        "ms a step": _ms(row["seconds"]),
        "steps/s": f"{row['steps_per_second']:.4g}",
        "images/s": f"{row['images_per_second']:.4g}",
        "GFLOP a step": f"{row['flops'] / 1e9:.4g}",
        "share of peak": f"{100 * row['share_of_peak']:.1f} %",
        "bare, ms": _ms(bare["seconds"]),
        "bare, share of peak": f"{100 * bare['share_of_peak']:.1f} %",
        "times bare": f"{row['ratio_to_bare']:.2f}",
    }
    if plain is not None:
        figures |= {
            "plain eager fp32, ms": _ms(plain["seconds"]),
            "faster than plain": f"{row['speedup_over_plain']:.2f}x",
        }
    return figures | {"memory": _bytes(row["peak_memory_bytes"])}


def _speeds(loops: list[dict[str, Any]]) -> str:
    peaks = {row["precision"]: row["matmul_peak"] for row in loops}
    return ", ".join(f"{SHORT[name]} {value / 1e12:.3g} TFLOP/s" for name, value in peaks.items())


def _blocks(row: dict[str, Any]) -> RenderableType:
    title = f"{row['loop']}, block by block"
    table = new_table(title, "block", "ms a step", "bare, ms", "times bare")
    for part in row["parts"]:
        table.add_row(
            escape(part["name"]), _ms(part["seconds"]), _ms(part["bare"]["seconds"]),
            f"{part['ratio_to_bare']:.2f}",
        )  # fmt: skip
    return table


def _growth(along: str, points: list[dict[str, Any]]) -> Iterable[RenderableType]:
    table = new_table(
        f"growth along {along}", "loop", along, "ms a step", "images/s", "schedule", "memory", texts=2
    )  # fmt: skip
    failed = []
    for point in points:
        place = [point["loop"], escape(point["size"])]
        if "error" in point:
            failed.append(f"{', '.join(place)}: {escape(point['error'])}")
            continue
        table.add_row(
            *place, _ms(point["seconds"]), f"{point['images_per_second']:.4g}",
            f"{point['schedule_seconds'] / 60:.1f} min", _bytes(point["peak_memory_bytes"]),
        )  # fmt: skip
    yield table
    yield from failed


def _bytes(count: int | None) -> str:
    return "not measured" if count is None else size(count)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"
