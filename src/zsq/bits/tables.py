# SPDX-License-Identifier: Apache-2.0
"""Choices of bits as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import RenderableType
from rich.markup import escape

from zsq.bits.costs import cost_label, shown_cost
from zsq.bits.plan import BitsPlan, EdgePlan
from zsq.runtime.amounts import size
from zsq.tables import new_table


def bits_tables(plan: BitsPlan) -> Iterable[RenderableType]:
    """Show a choice of bits, and the frontier it lies on."""
    frontier = new_table("frontier", cost_label(plan.kind), "summed sensitivity (nats)")
    shown = plan.frontier[:: max(len(plan.frontier) // 15, 1)]
    for point in shown:
        frontier.add_row(f"{shown_cost(plan.kind, point.cost):.6g}", f"{point.sensitivity:.4g}")
    yield frontier
    table = new_table(f"bits for {escape(plan.model)}, {plan.protocol}, {plan.budget}",
                   "layer", "weights", "bits", "sensitivity\nthere", "at 4 bits")  # fmt: skip
    for path, bits in plan.layers.items():
        values = plan.measured.get(path, {})
        cells = _sensitivities(values, bits) if values else ("fixed", "")
        table.add_row(escape(path), f"{plan.weights[path]:,}", str(bits), *cells)
    yield table
    if plan.edges is not None:
        yield from _edge_tables(plan.edges)
    yield (
        f"average {plan.average():.3f} bits per weight of the {len(plan.free)} free layers; all weights "
        f"{size(plan.onnx_bytes())} in the ONNX file (INT4 up to 4 bits, INT8 above and in depthwise "
        f"layers; scales, biases and the graph come on top), {size(plan.bytes())} packed in "
        f"student.safetensors; summed "
        f"sensitivity {plan.sensitivity:.4g}{'' if plan.exact else ' (frontier thinned out: not exact)'}."
    )


def _sensitivities(values: Mapping[int, float], bits: int) -> tuple[str, str]:
    """Say how sensitive something is at the bits it got, and at 4 where that was measured."""
    return f"{values[bits]:.2e}", f"{values[4]:.2e}" if 4 in values else ""


def _edge_tables(plan: EdgePlan) -> Iterable[RenderableType]:
    table = new_table(f"bits of activations, {plan.budget:g} on average",
                   "tensor", "values\nan image", "bits", "sensitivity\nthere", "at 4 bits")  # fmt: skip
    for name, bits in plan.edges.items():
        cells = _sensitivities(plan.measured[name], bits)
        table.add_row(escape(name), f"{plan.values[name]:,}", str(bits), *cells)
    yield table
    yield (
        f"average {plan.cost:.3f} bits per value of the {len(plan.edges)} free tensors; summed sensitivity "
        f"{plan.sensitivity:.4g}{'' if plan.exact else ' (frontier thinned out: not exact)'}."
    )
