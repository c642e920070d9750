# SPDX-License-Identifier: Apache-2.0
"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from zsq.analysis.curvature import Curvature
from zsq.analysis.layers import Diagnosis
from zsq.bits.costs import cost_label, shown_cost
from zsq.bits.plan import BitsPlan, EdgePlan
from zsq.config import (
    GeneratorSynthesis,
    MixedSynthesis,
    RangeCalibration,
    Recipe,
    Reconstruction,
    to_yaml,
)
from zsq.settings import Part
from zsq.teacher.inspect import Inspection


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table in the style of all of them; numbers stand on the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def size(count: float) -> str:
    """Write a number of bytes for people.

    Example:
        >>> size(1_500_000)
        '1.50 MB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"


def run_table(record: dict[str, Any]) -> Iterable[RenderableType]:
    """Summarise a finished run."""
    table = new_table(f"run {escape(record['run'])}: {record['status']}", "what", "value")
    identity = record["identity"]
    recipe = identity["recipe"]
    bits = recipe["bits"]
    table.add_row("model", escape(identity["model"]))
    table.add_row(
        "recipe",
        f"{recipe['name']}, {recipe['protocol']}, w{bits['weights']}a{bits['activations']}",
    )
    for stage, seconds in record["timings"].items():
        table.add_row(f"time, {stage}", f"{seconds:.1f} s")
    yield table
    if "export" in record["results"]:
        yield from export_table(record["results"]["export"])


def export_table(report: dict[str, Any]) -> Iterable[RenderableType]:
    """Show what an export came to."""
    table = new_table("ONNX file against the simulation", "what", "value")
    for key, value in report.items():
        if key == "bytes" or key.endswith("_bytes"):
            value = size(value)
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
    yield table
    if report["speedup"] < 1:
        yield (
            f"The integer file is slower here than the float one ({report['latency_ms']:.3g} ms against "
            f"{report['float_latency_ms']:.3g} ms an image): networks this small, and processors "
            "without VNNI or dot-product instructions, gain size only."
        )


def evaluation_table(result: dict[str, Any]) -> Iterable[RenderableType]:
    """Show accuracies."""
    table = new_table(
        f"accuracy on {escape(result['data'])}", "network", "top-1 %", "+-", "top-5 %", "images"
    )
    for name in ("teacher", "student", "simulation", "onnx"):
        if name in result:
            score = result[name]
            cells = (
                f"{score['top1']:.2f}",
                f"{score['stderr']:.2f}",
                f"{score['top5']:.2f}",
                str(score["images"]),
            )
            table.add_row(name, *cells)
    yield table
    if "agreement" in result:
        drop = result["drop"]
        yield (
            f"teacher and student agree on {result['agreement']:.2f} % of the images; the student is "
            f"{drop['points']:.2f} +- {drop['stderr']:.2f} points below."
        )
    if "divergence" in result:
        apart = result["divergence"]
        yield (
            f"The student's predictions diverge from the teacher's by {apart['nats']:.4f} +- "
            f"{apart['stderr']:.4f} nats an image, which tells students apart that top-1 does not."
        )
    if "agreement" in result.get("onnx", {}):
        yield f"ONNX file and its simulation agree on {result['onnx']['agreement']:.2f} %."


def inspection_tables(found: Inspection) -> Iterable[RenderableType]:
    """Show what was understood of a network."""
    facts = new_table(escape(found.model), "what", "value")
    facts.add_row("input", " x ".join(map(str, found.input_shape)))
    facts.add_row("parameters", f"{found.parameters:,}")
    facts.add_row("multiply-accumulates", f"{found.macs:,}")
    facts.add_row("size in float32", size(found.float_bytes))
    facts.add_row("batch norms with statistics", str(len(found.batch_norms)))
    facts.add_row("of them foldable", str(len(found.pairs)))
    yield facts
    if not found.batch_norms:
        yield (
            "No batch norm has running statistics: images cannot be synthesised from this network; "
            "quantize it with --images FOLDER."
        )
    if found.floating:
        yield (
            f"These stay in float under every protocol: {escape(', '.join(found.floating))}. An ONNX file with "
            "them is kept only with `zsq export RUN --allow-partial`."
        )
    units = new_table("reconstruction units", "unit", "layers")
    for unit in found.units:
        parts = f", tuned in {unit['parts']} parts" if unit["parts"] > 1 else ""
        units.add_row(escape(unit["name"]), f"{len(unit['layers'])}{parts}")
    yield units
    plans = new_table(
        "protocols", "protocol", "weights (layers)", "activations (tensors)", "expected size"
    )
    for name, plan in found.protocols.items():
        cells = [
            ", ".join(f"{n} at {b}" for b, n in plan[k].items()) for k in ("weights", "activations")
        ]
        plans.add_row(name, *cells, size(plan["bytes"]))
    yield plans
    layers = new_table(
        "layers", "layer", "weight", "groups", "MACs", *(f"bits, {p}" for p in found.protocols)
    )
    for layer in found.layers:
        bits = [str(layer["bits"][p]) for p in found.protocols]
        shape = "x".join(map(str, layer["weight"]))
        layers.add_row(
            escape(layer["path"]), shape, str(layer["groups"]), f"{layer['macs']:,}", *bits
        )
    yield layers
    tensors = new_table(
        "tensors", "tensor", "read by", "values", *(f"bits, {p}" for p in found.protocols)
    )
    for tensor in found.tensors:
        bits = [str(tensor["bits"][p] or "float") for p in found.protocols]
        readers = escape(", ".join(tensor["read_by"]))
        tensors.add_row(tensor["name"], readers, f"{prod(tensor['shape']):,}", *bits)
    yield tensors


def recipes_table(found: Iterable[Recipe]) -> Iterable[RenderableType]:
    """List recipes."""
    table = Table(title="recipes (zsq recipes NAME shows every setting)", title_justify="left")
    for column in ("recipe", "what", "paper", "full schedule"):
        table.add_column(column, overflow="fold")
    for recipe in found:
        table.add_row(recipe.name, escape(recipe.title), escape(recipe.paper), _schedule(recipe))
    yield table


def _schedule(recipe: Recipe) -> str:
    """Say in a few words how long a recipe works at what."""
    synthesis, tuning = recipe.synthesis, recipe.tuning
    if isinstance(synthesis, GeneratorSynthesis):
        images = f"{synthesis.steps} generator steps"
    elif isinstance(synthesis, MixedSynthesis):
        images = f"{synthesis.images} images in {len(synthesis.parts)} parts"
    else:
        images = f"{synthesis.images} images x {synthesis.steps} steps"
    if isinstance(tuning, Reconstruction):
        return f"{images}, {tuning.steps} steps a {tuning.unit}"
    if isinstance(tuning, RangeCalibration):
        return f"{images}, no training"
    return f"{images}, {tuning.steps} student steps"


def recipe_details(recipe: Recipe) -> Iterable[RenderableType]:
    """Show one recipe with the meaning of its settings."""
    yield escape(to_yaml(recipe))
    table = new_table("what the settings mean", "setting", "meaning")
    parts: dict[str, Part] = {
        "synthesis": recipe.synthesis, "tuning": recipe.tuning,
    }  # fmt: skip
    for part, settings in list(parts.items()):
        nested = {f"{part}.{name}": value for name, value in settings if isinstance(value, Part)}
        parts |= nested
    for part, settings in parts.items():
        for name, field in type(settings).model_fields.items():
            if field.description:
                table.add_row(f"{part}.{name}", escape(field.description))
    yield table


def bits_tables(plan: BitsPlan) -> Iterable[RenderableType]:
    """Show a choice of bits, and the frontier it lies on."""
    frontier = new_table("frontier", cost_label(plan.kind), "summed sensitivity (nats)")
    shown = plan.frontier[:: max(len(plan.frontier) // 15, 1)]
    for point in shown:
        frontier.add_row(f"{shown_cost(plan.kind, point.cost):.6g}", f"{point.sensitivity:.4g}")
    yield frontier
    table = new_table(f"bits for {escape(plan.model)}, {plan.protocol}, {plan.budget}",
                   "layer", "weights", "bits", "sensitivity there", "at 4 bits")  # fmt: skip
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
                   "tensor", "values an image", "bits", "sensitivity there", "at 4 bits")  # fmt: skip
    for name, bits in plan.edges.items():
        cells = _sensitivities(plan.measured[name], bits)
        table.add_row(escape(name), f"{plan.values[name]:,}", str(bits), *cells)
    yield table
    yield (
        f"average {plan.cost:.3f} bits per value of the {len(plan.edges)} free tensors; summed sensitivity "
        f"{plan.sensitivity:.4g}{'' if plan.exact else ' (frontier thinned out: not exact)'}."
    )


def diagnosis_tables(found: Diagnosis, shown: int = 20) -> Iterable[RenderableType]:
    """Show what hurts, worst first."""
    table = new_table(
        f"divergence {found.divergence:.4g} nats from the teacher on {found.images} images, {found.protocol}",
        "weight or edge", "bits", "gain if float", "alone", "SQNR dB", "clipped", "unused codes",
    )  # fmt: skip
    for item in found.items[:shown]:
        ratio = "exact" if item.sqnr is None else f"{item.sqnr:.1f}"
        table.add_row(
            f"{item.kind} {escape(item.name)}", str(item.bits), f"{found.gain(item):.3g}", f"{item.only:.3g}",
            ratio, f"{100 * item.clipped:.2f} %", f"{100 * item.unused:.0f} %",
        )  # fmt: skip
    yield table
    if len(found.items) > shown:
        yield f"and {len(found.items) - shown} more, in diagnosis.json."
    suggestions = found.suggestions()
    yield (
        "To spend bits where they help most, add one of these to `zsq quantize`:"
        if suggestions
        else "No single item stands out: more bits everywhere, or longer tuning, is the next step."
    )
    yield from (escape(text) for text in suggestions)


def sweep_tables(rows: list[dict[str, Any]]) -> Iterable[RenderableType]:
    """Show a sweep's cells."""
    table = new_table(
        "sweep", "model", "recipe", "bits", "seed", "top-1 %", "drop", "smaller", "status"
    )
    for row in rows:
        shown = [row.get(key) for key in ("student", "drop", "ratio")]
        cells = ["" if value is None else f"{value:.2f}" for value in shown]
        table.add_row(escape(row["model"]), escape(row["recipe"]), row["bits"], str(row["seed"]), *cells,
                      row["status"])  # fmt: skip
    yield table
    failed = [row for row in rows if row["status"] != "done"]
    if failed:
        yield f"{len(failed)} of {len(rows)} cells failed:"
        yield from (escape(f"{row['folder']}: {row['error']}") for row in failed)


def curvature_table(found: Curvature) -> Iterable[RenderableType]:
    """Show trace and largest eigenvalues of every loss."""
    table = new_table(
        f"curvature in {found.parameters:,} weights", "loss", "trace", "+-", "largest eigenvalues"
    )
    for name, trace in found.traces.items():
        values = ", ".join(f"{value:.4g}" for value in found.spectra[name].values)
        table.add_row(name, f"{trace.value:.4g}", f"{trace.stderr:.2g}", values)
    yield table


def environment_table(found: dict[str, object]) -> Iterable[RenderableType]:
    """Show the environment."""
    table = new_table("environment", "what", "value")
    for key, value in found.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, content in rows:
            table.add_row(f"{key} {name}".strip(), escape(str(content)))
    yield table


def demo_table(result: dict[str, Any]) -> Iterable[RenderableType]:
    """Show FP32, simulation and ONNX file side by side."""
    table = new_table(
        result["title"], "network", "top-1 % on held-out digits", "size", "time per image"
    )
    for row in result["rows"]:
        time = "" if row["milliseconds"] is None else f"{row['milliseconds']:.3f} ms"
        table.add_row(row["name"], f"{row['top1']:.2f}", size(row["bytes"]), time)
    yield table
    yield escape(result["closing"])
