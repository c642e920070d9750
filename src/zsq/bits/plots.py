# SPDX-License-Identifier: Apache-2.0
"""A bits file with its pictures: the frontier, and each layer's sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zsq.bits.costs import cost_label, shown_cost
from zsq.bits.plan import BitsPlan
from zsq.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_frontier(plan: BitsPlan) -> Figure:
    """Draw summed sensitivity over cost, with the chosen point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(
        [shown_cost(plan.kind, p.cost) for p in plan.frontier],
        [p.sensitivity for p in plan.frontier], where="post", marker=".", markersize=3, linewidth=1,
        label="best choices",
    )  # fmt: skip
    axes.plot(
        shown_cost(plan.kind, plan.cost), plan.sensitivity, "o", label=f"chosen for {plan.budget}"
    )
    axes.set(
        xlabel=cost_label(plan.kind), yscale="log",
        ylabel="summed sensitivity (KL, nats)", title=plan.model,
    )  # fmt: skip
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def plot_sensitivity(plan: BitsPlan) -> Figure:
    """Draw every free layer's sensitivity at each bit-width; chosen widths are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.28 * len(plan.free)), 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(plan.free))
    for bits in sorted({b for values in plan.measured.values() for b in values}):
        axes.plot(
            places, [max(plan.measured[p].get(bits, 0.0), 1e-9) for p in plan.free], marker=".",
            linewidth=1, label=f"{bits} bits",
        )  # fmt: skip
    chosen = [max(plan.measured[p][plan.layers[p]], 1e-9) for p in plan.free]
    axes.plot(places, chosen, "o", markerfacecolor="none", color="black", label="chosen")
    axes.set_xticks(list(places), plan.free, rotation=90, fontsize=6)
    axes.set(yscale="log", ylabel="sensitivity (KL, nats)", title=plan.model)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7, ncols=4)
    return figure


def write_plan(plan: BitsPlan, folder: Path) -> None:
    """Write ``bits.yaml``, ``bits_frontier.png`` and ``bits_sensitivity.png`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "bits.yaml")
    for name, figure in (
        ("frontier", plot_frontier(plan)),
        ("sensitivity", plot_sensitivity(plan)),
    ):
        with atomic_write(folder / f"bits_{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
