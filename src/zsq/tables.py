# SPDX-License-Identifier: Apache-2.0
"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from zsq.config import (
    GeneratorSynthesis,
    MixedSynthesis,
    RangeCalibration,
    Recipe,
    Reconstruction,
    to_yaml,
)
from zsq.errors import printable
from zsq.runtime.amounts import size
from zsq.settings import Part
from zsq.teacher.inspect import Inspection


class _Table(Table):
    """A table that shows what a terminal would act on instead: names come from files."""

    def add_row(self, *cells: RenderableType | None, **more: Any) -> None:
        """Add a row of cells."""
        super().add_row(*(printable(c) if isinstance(c, str) else c for c in cells), **more)


def new_table(title: str, *columns: str, texts: int = 1) -> Table:
    """Return an empty table in the style of all of them.

    Args:
        title: above it.
        columns: their headers; a line break keeps a long one narrow.
        texts: so many of the first columns hold text, which is folded where a terminal is narrow; the
            others hold numbers, which stand on the right in one piece.
    """
    table = _Table(
        title=printable(title), title_justify="left", title_style="bold", header_style="bold",
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for index, column in enumerate(columns):
        text = index < texts
        table.add_column(
            column,
            justify="left" if text else "right",
            overflow="fold" if text else "ellipsis",
            no_wrap=not text,
        )
    return table


def run_table(record: dict[str, Any]) -> Iterable[RenderableType]:
    """Summarise a finished run."""
    table = new_table(
        f"run {escape(record['run'])}: {escape(str(record['status']))}", "what", "value", texts=2
    )
    identity = record["identity"]
    recipe = identity["recipe"]
    table.add_row("model", escape(identity["model"]))
    table.add_row(
        "recipe",
        escape(f"{recipe['name']}, {recipe['protocol']}, {_bits_of(recipe)}"),
    )
    for stage, seconds in record["timings"].items():
        table.add_row(escape(f"time, {stage}"), f"{seconds:.1f} s")
    yield table
    if "export" in record["results"]:
        yield from export_table(record["results"]["export"])


def _bits_of(recipe: dict[str, Any]) -> str:
    """Return a recipe's widths, and whether some layers or tensors have others."""
    bits, mixed = recipe["bits"], " mixed" if recipe.get("overrides") else ""
    return f"w{bits['weights']}a{bits['activations']}{mixed}"


def export_table(report: dict[str, Any]) -> Iterable[RenderableType]:
    """Show what an export came to."""
    table = new_table("ONNX file against the simulation", "what", "value", texts=2)
    for label, value in _export_rows(report):
        table.add_row(label, escape(value))
    yield table
    if report["speedup"] < 1:
        yield (
            f"The integer file is slower here than the float one ({report['latency_ms']:.3g} ms against "
            f"{report['float_latency_ms']:.3g} ms an image): networks this small, and processors "
            "without VNNI or dot-product instructions, gain size only."
        )


def _export_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what an export was measured to be, in words; `ExportReport` has the names of JSON."""
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    times = f"{report['latency_ms']:.3g} ms, float {report['float_latency_ms']:.3g} ms"
    rows = [
        ("made for", str(report["target"])),
        ("agreement, file/simulation", f"{report['agreement']:.2f} % of {report['images']} images"),
        ("largest logit difference", f"{report['max_step_difference']:.3g} steps (1/255 of their range)"),
        ("identical logits", f"{report['identical']:.2f} %"),
        ("agreement, simulation/student", f"{report['student_agreement']:.2f} %"),
        ("divergence, simulation/student", f"{report['student_divergence']:.3g} nats an image"),
        ("integer convolutions", f"{report['fused']} of {report['convs']}"),
        ("integer matrix products", f"{report['fused_matmuls']} of {report['matmuls']}"),
        *(("left in float", str(reason)) for reason in report["unfused"]),
        ("size", f"{size(report['bytes'])}, {report['ratio']:.2f}x smaller than {size(report['float_bytes'])}"),
        ("time of an image", f"{times}: {report['speedup']:.2f}x the speed ({threads})"),
    ]  # fmt: skip
    return rows


def evaluation_table(result: dict[str, Any]) -> Iterable[RenderableType]:
    """Show accuracies."""
    table = new_table(
        f"accuracy on {escape(result['data'])}",
        "network",
        "top-1 %",
        "+-",
        "top-5 %",
        "+-",
        "images",
    )
    for name in ("teacher", "student", "simulation", "onnx"):
        if name in result:
            score = result[name]
            cells = (
                f"{score['top1']:.2f}",
                f"{score['stderr']:.2f}",
                f"{score['top5']:.2f}",
                f"{score['top5_stderr']:.2f}",
                str(score["images"]),
            )
            table.add_row(name, *cells)
    yield table
    if "agreement" in result:
        drop = result["drop"]
        yield (
            f"teacher and student agree on {result['agreement']:.2f} +- {result['agreement_stderr']:.2f} % of the "
            "images; the student (the recipe's own protocol, as papers measure it) is "
            f"{drop['points']:.2f} +- {drop['stderr']:.2f} points below."
        )
    if "divergence" in result:
        apart = result["divergence"]
        yield (
            f"The student's predictions diverge from the teacher's by {apart['nats']:.4f} +- "
            f"{apart['stderr']:.4f} nats an image, which tells students apart that top-1 does not."
        )
    if "agreement" in result.get("onnx", {}):
        yield (
            f"ONNX file and its simulation (the integer network, computed exactly) agree on "
            f"{result['onnx']['agreement']:.2f} % of {result['simulation']['images']} images."
        )


def inspection_tables(found: Inspection) -> Iterable[RenderableType]:
    """Show what was understood of a network."""
    facts = new_table(escape(found.model), "what", "value", texts=2)
    facts.add_row("input", " x ".join(map(str, found.input_shape)))
    known = found.mean is not None and found.std is not None
    facts.add_row(
        "normalisation", _normalisation(found) if known else "unknown: pass --mean and --std"
    )
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
    plans = new_table("protocols", "protocol", "weights", "activations", "packed size", texts=3)
    for name, plan in found.protocols.items():
        cells = [
            ", ".join(f"{n} at {b}" for b, n in plan[k].items()) for k in ("weights", "activations")
        ]
        plans.add_row(name, *cells, size(plan["bytes"]))
    yield plans
    order = "/".join(found.protocols)
    layers = new_table(f"layers, bits under {order}", "layer", "weight", "groups", "MACs", "bits")
    for layer in found.layers:
        shape = "x".join(map(str, layer["weight"]))
        layers.add_row(
            escape(layer["path"]), shape, str(layer["groups"]), f"{layer['macs']:,}", _widths(layer)
        )
    yield layers
    tensors = new_table(
        f"tensors, bits under {order}", "tensor", "read by", "values", "bits", texts=2
    )
    for tensor in found.tensors:
        readers = escape(", ".join(tensor["read_by"]))
        tensors.add_row(
            escape(tensor["name"]), readers, f"{prod(tensor['shape']):,}", _widths(tensor)
        )  # fmt: skip
    yield tensors


def _normalisation(found: Inspection) -> str:
    mean, std = (", ".join(f"{x:.4g}" for x in values or ()) for values in (found.mean, found.std))
    return f"mean {mean}; std {std}"


def _widths(item: dict[str, Any]) -> str:
    """Return the bits of a layer or tensor, protocol by protocol."""
    return "/".join(str(bits or "float") for bits in item["bits"].values())


def recipes_table(found: Iterable[Recipe]) -> Iterable[RenderableType]:
    """List recipes."""
    table = new_table(
        "recipes (zsq recipes NAME shows every setting)", "recipe", "what, paper, full schedule", texts=2
    )  # fmt: skip
    for recipe in found:
        less = "\n".join(line for line in (recipe.paper, _schedule(recipe)) if line)
        table.add_row(recipe.name, f"{escape(recipe.title)}\n[dim]{escape(less)}[/]")
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
    table = new_table("what the settings mean", "setting", "meaning", texts=2)
    parts: dict[str, Part] = {
        "": recipe, "synthesis": recipe.synthesis, "tuning": recipe.tuning,
    }  # fmt: skip
    for part, settings in list(parts.items()):
        nested = {f"{part}.{name}": value for name, value in settings if isinstance(value, Part)}
        parts |= nested
    for part, settings in parts.items():
        for name, field in type(settings).model_fields.items():
            if field.description:
                table.add_row(
                    f"{part}.{name}".lstrip("."), escape(field.description.replace("``", ""))
                )
    yield table


def environment_table(found: dict[str, object]) -> Iterable[RenderableType]:
    """Show the environment."""
    table = new_table("environment", "what", "value", texts=2)
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
