# SPDX-License-Identifier: Apache-2.0
"""Analyses as tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.markup import escape

from zsq.analysis.curvature import Curvature
from zsq.analysis.layers import Diagnosis
from zsq.tables import new_table


def diagnosis_tables(found: Diagnosis, shown: int = 20) -> Iterable[RenderableType]:
    """Show what hurts, worst first."""
    table = new_table(
        f"divergence {found.divergence:.4g} nats from the teacher on {found.images} images, {found.protocol}",
        "weight or edge", "bits", "gain if\nfloat", "alone", "SQNR\ndB", "clipped", "unused\ncodes",
    )  # fmt: skip
    for item in found.items[:shown]:
        ratio = "exact" if item.sqnr is None else f"{item.sqnr:.1f}"
        table.add_row(
            f"{item.kind} {escape(item.name)}", str(item.bits), f"{found.gain(item):.2g}", f"{item.only:.2g}",
            ratio, f"{100 * item.clipped:.2f} %", f"{100 * item.unused:.0f} %",
        )  # fmt: skip
    yield table
    if len(found.items) > shown:
        yield f"and {len(found.items) - shown} more; --json shows all."
    suggestions = found.suggestions()
    yield (
        "To spend bits where they help most, add one of these to `zsq quantize`, each of which does what those "
        "above it do (or change the bits file where they say so):"
        if suggestions
        else "No single item stands out: more bits everywhere, or longer tuning, is the next step."
    )
    yield from (escape(text) for text in suggestions)


def curvature_table(found: Curvature) -> Iterable[RenderableType]:
    """Show trace and largest eigenvalues of every loss."""
    table = new_table(
        f"curvature in {found.parameters:,} weights", "loss", "trace", "+-", "largest eigenvalues"
    )
    for name, trace in found.traces.items():
        values = ", ".join(f"{value:.4g}" for value in found.spectra[name].values)
        table.add_row(name, f"{trace.value:.4g}", f"{trace.stderr:.2g}", values)
    yield table
