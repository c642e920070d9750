# SPDX-License-Identifier: Apache-2.0
"""A bits file with its pictures: the frontiers, and the sensitivity of each layer and tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zsq.bits.costs import cost_label, shown_cost
from zsq.bits.plan import BitsPlan, Point
from zsq.runtime.files import atomic_write, make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_frontier(plan: BitsPlan) -> Figure:
    """Draw summed sensitivity over cost, with the chosen point, of what was chosen: weights, activations or both."""
    from matplotlib.figure import Figure

    weights, edges = len(plan.frontier) > 1 or plan.edges is None, plan.edges
    count = int(weights) + int(edges is not None)
    figure = Figure(figsize=(6 * count, 4), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    figure.suptitle(plan.model)
    if weights:
        shown = [
            Point(cost=shown_cost(plan.kind, p.cost), sensitivity=p.sensitivity)
            for p in plan.frontier
        ]
        chosen = Point(cost=shown_cost(plan.kind, plan.cost), sensitivity=plan.sensitivity)
        _draw_frontier(axes[0], shown, chosen, plan.budget, cost_label(plan.kind))
    if edges is not None:
        chosen = Point(cost=edges.cost, sensitivity=edges.sensitivity)
        label = "average bits per value, free activations"
        _draw_frontier(axes[-1], edges.frontier, chosen, f"{edges.budget:g} bits per value", label)
    return figure


def _draw_frontier(
    axes: Axes, points: Sequence[Point], chosen: Point, budget: str, label: str
) -> None:
    axes.step(
        [p.cost for p in points], [p.sensitivity for p in points], where="post", marker=".",
        markersize=3, linewidth=1, label="best choices",
    )  # fmt: skip
    axes.plot(chosen.cost, chosen.sensitivity, "o", label=f"chosen for {budget}")
    axes.set(xlabel=label, yscale="log", ylabel="summed sensitivity (KL, nats)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def plot_sensitivity(plan: BitsPlan) -> Figure:
    """Draw every free layer's sensitivity at each bit-width, below it every free tensor's; chosen widths are marked."""
    from matplotlib.figure import Figure

    widest = max(len(plan.free), len(plan.edges.edges) if plan.edges else 0)
    count = 2 if plan.edges else 1
    figure = Figure(figsize=(max(6, 0.28 * widest), 4.5 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    figure.suptitle(plan.model)
    _draw_sensitivity(axes[0], plan.measured, {path: plan.layers[path] for path in plan.free})
    if plan.edges:
        _draw_sensitivity(axes[1], plan.edges.measured, plan.edges.edges)
    return figure


def _draw_sensitivity(
    axes: Axes, measured: Mapping[str, Mapping[int, float]], chosen: Mapping[str, int]
) -> None:
    places = range(len(chosen))
    for bits in sorted({b for values in measured.values() for b in values}):
        axes.plot(
            places, [max(measured[name].get(bits, 0.0), 1e-9) for name in chosen], marker=".",
            linewidth=1, label=f"{bits} bits",
        )  # fmt: skip
    # a width that someone wrote into the file was not measured
    known = [(i, measured[name].get(bits)) for i, (name, bits) in enumerate(chosen.items())]
    there = [(i, max(value, 1e-9)) for i, value in known if value is not None]
    axes.plot(
        [i for i, _ in there], [value for _, value in there], "o", markerfacecolor="none",
        color="black", label="chosen",
    )  # fmt: skip
    axes.set_xticks(list(places), list(chosen), rotation=90, fontsize=6)
    # the frontier takes more bits to hurt no more than fewer do, which measured values need not say
    axes.set(yscale="log", ylabel="sensitivity as measured (KL, nats)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7, ncols=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def write_plan(plan: BitsPlan, folder: Path) -> None:
    """Write ``bits.yaml``, ``bits_frontier.png`` and ``bits_sensitivity.png`` into a folder."""
    make_folder(folder)
    plan.save(folder / "bits.yaml")
    for name, figure in (
        ("frontier", plot_frontier(plan)),
        ("sensitivity", plot_sensitivity(plan)),
    ):
        with atomic_write(folder / f"bits_{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
