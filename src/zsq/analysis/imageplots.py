# SPDX-License-Identifier: Apache-2.0
"""The picture of an image report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zsq.analysis.images import BINS, ImageReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The least that a logarithmic axis shows.
SMALLEST = 1e-12


def plot_images(report: ImageReport) -> Figure:
    """Draw distance per layer, images per class and the histogram of confidence."""
    from matplotlib.figure import Figure

    width = min(max(8.0, 0.2 * len(report.images.distances)), 40.0)
    figure = Figure(figsize=(width, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _plot_distances(figure.add_subplot(grid[0, :]), report)
    _plot_classes(figure.add_subplot(grid[1, 0]), report)
    _plot_confidence(figure.add_subplot(grid[1, 1]), report)
    figure.suptitle(f"{report.images.images} images for {report.model}")
    return figure


def _plot_distances(axes: Axes, report: ImageReport) -> None:
    axes.set_title("distance of batch norm statistics")
    paths = list(report.images.distances)
    if not paths:
        axes.text(0.5, 0.5, "the network has no batch norms", ha="center", va="center")
        axes.set_axis_off()
        return
    for facts, name in ((report.images, "images"), (report.real, "real images")):
        if facts is not None:
            values = [max(v, SMALLEST) if math.isfinite(v) else math.nan
                      for v in facts.distances.values()]  # fmt: skip
            axes.plot(range(len(paths)), values, marker=".", linewidth=1, label=name)
    axes.set_xticks(list(range(len(paths))), paths, rotation=90, fontsize=6)
    axes.set(yscale="log", ylabel="mean squared difference")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)


def _plot_classes(axes: Axes, report: ImageReport) -> None:
    counts = report.images.class_counts
    axes.stairs(counts, [i - 0.5 for i in range(len(counts) + 1)], fill=True)
    axes.axhline(sum(counts) / len(counts), color="black", linewidth=1, linestyle=":", label="even")
    axes.set(title="images per class", xlabel="class", ylabel="images")
    axes.legend(fontsize=7)


def _plot_confidence(axes: Axes, report: ImageReport) -> None:
    edges = [i / BINS for i in range(BINS + 1)]
    for facts, name in ((report.images, "images"), (report.real, "real images")):
        if facts is not None:
            total = max(sum(facts.confidence_histogram), 1)
            shares = [count / total for count in facts.confidence_histogram]
            axes.stairs(shares, edges, fill=facts is report.images, label=name, linewidth=1.5)
    axes.set(title="confidence", xlabel="the teacher's largest probability", ylabel="share")
    axes.legend(fontsize=7)
