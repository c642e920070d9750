# SPDX-License-Identifier: Apache-2.0
"""Growth curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsq.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is drawn over the size: key, unit, factor.
_ROWS = (
    ("seconds", "ms a step", 1e3),
    ("schedule_seconds", "whole schedule, min", 1 / 60),
    ("peak_memory_bytes", "memory, MB", 1e-6),
)


def plot_growth(points: list[dict[str, Any]]) -> Figure:
    """Draw time and memory over each axis that was grown along, a line per loop.

    Args:
        points: ``growth`` of what `zsq.bench.run.bench` returns.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axes_names = list(dict.fromkeys(point["along"] for point in points))
    figure = Figure(figsize=(4.5 * len(axes_names), 8), layout="constrained")
    grid = figure.subplots(len(_ROWS), len(axes_names), squeeze=False)
    for column, along in enumerate(axes_names):
        for row, (key, unit, factor) in enumerate(_ROWS):
            axes = grid[row][column]
            for loop in dict.fromkeys(point["loop"] for point in points):
                own = [p for p in points if (p["along"], p["loop"]) == (along, loop)]
                own = [p for p in own if p.get(key) is not None]
                axes.plot(
                    [_place(p) for p in own], [factor * p[key] for p in own], ".-", label=loop
                )
            axes.set(xlabel="parameters" if along == "network" else along, ylabel=unit)
            axes.margins(y=0.15)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(visible=True, alpha=0.3)
    grid[0][0].legend(fontsize=7)
    return figure


def _place(point: dict[str, Any]) -> int:
    """Return where a point lies on its axis."""
    return int(point["parameters"] if point["along"] == "network" else point["size"])


def write_growth(points: list[dict[str, Any]], path: Path) -> None:
    """Write the curves as a PNG file."""
    with atomic_write(path) as temporary:
        plot_growth(points).savefig(temporary, format="png", dpi=120)
