# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that opens anywhere, and a summary in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from zsq.analysis.layers import Diagnosis
from zsq.artifact.facts import (
    RunFacts,
    check_facts,
    collect_facts,
    comparison,
    data_note,
    settings_of,
)
from zsq.errors import UsageError
from zsq.markdown import markdown_table, plain
from zsq.runtime.ambient import own_modes
from zsq.runtime.files import atomic_write, check_destination
from zsq.runtime.progress import QuietReporter, Reporter

#: What records of other keys and types than a run writes end in. They are read in too many places to be
#: looked through before.
_CHANGED = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


@own_modes()
def write_report(
    runs: str | Path | Sequence[str | Path], out: str | Path | None = None, *,
    real: str | Path | None = None, reporter: Reporter | None = None,
) -> Path:  # fmt: skip
    """Write a report on one or more runs.

    The page holds its pictures, needs neither a network nor a server, and its tables sort.

    Args:
        runs: folders that `quantize` wrote; several are set side by side.
        out: the HTML file; ``report.html`` in the first run's folder by default. The Markdown
            summary goes beside it.
        real: an ImageFolder of real images to set the runs' images beside.
        reporter: progress.

    Returns:
        The HTML file.

    Raises:
        UsageError: no run, one that is not finished, or a file that cannot be written.
    """
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    if not runs:
        raise UsageError("no run was given; name the folder of at least one finished run.")
    path = Path(out) if out is not None else Path(runs[0]) / "report.html"
    if out is not None:
        check_destination(path, (".html", ".htm"))
    for run in runs:  # a diagnosis takes a minute
        check_facts(run, real)
    check_destination(path)
    try:
        facts = [collect_facts(run, reporter or QuietReporter(), real) for run in runs]
        texts = {path: html_page(facts), path.with_suffix(".md"): markdown(facts)}
    except _CHANGED as error:
        raise UsageError(
            f"the records of {', '.join(map(str, runs))} do not say what a run's do ({type(error).__name__}: "
            f"{str(error)[:100]}): run.json or metrics.jsonl is damaged or was changed. Quantize into another folder."
        ) from error
    for target, text in texts.items():
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def protocols_note(runs: Sequence[RunFacts]) -> str:
    """Say that runs of different protocols are no contest; nothing where there is one protocol."""
    names = sorted({run.identity["recipe"]["protocol"] for run in runs})
    if len(names) < 2:
        return ""
    return (
        f"These runs quantize different things ({', '.join(names)}): their accuracies are not to be "
        "compared with each other, only each with FP32."
    )


def html_page(runs: list[RunFacts]) -> str:
    """Render the page."""
    title = ", ".join(run.name for run in runs)
    header, rows = comparison(runs)
    notes = [protocols_note(runs), data_note(runs)]
    parts = [
        f"<h1>Quantized without data: {escape(title)}</h1>",
        *(f"<p class=warning>{escape(warning)}</p>" for warning in notes if warning),
        _table(header, rows, "comparison"),
        "<p>Accuracy needs real images: <code>zsq evaluate RUN --data FOLDER</code> measures it and "
        "keeps it with the run; write the report again afterwards.</p>"
        if any("not measured" in cell for row in rows for cell in row)
        else "",
    ]
    parts += [_run_section(run) for run in runs]
    package = files("zsq").joinpath("artifact")
    style = package.joinpath("report.css").read_text(encoding="utf-8")
    script = package.joinpath("report.js").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>zsq: {escape(title)}</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + f"</main><script>{script}</script></body></html>\n"
    )


def _run_section(run: RunFacts) -> str:
    settings = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in settings_of(run).items()
    )
    warnings = "".join(f"<p class=warning>{escape(text)}</p>" for text in run.warnings)
    pictures = "".join(
        f"<figure><h3>{escape(p.title)}</h3><img src='{p.url()}' alt='{escape(p.title)}'>"
        f"<figcaption>{escape(p.text)}</figcaption></figure>"
        for p in run.pictures
    )
    timings = [[stage, f"{seconds:.1f}"] for stage, seconds in run.record["timings"].items()]
    return (
        f"<section><h2>{escape(run.name)}</h2>{warnings}<dl>{settings}</dl>"
        f"<h3>Layers and edges</h3>{_suggestions(run.diagnosis)}"
        f"{_table(*layer_table(run.diagnosis), 'layers')}"
        f"<div class=pictures>{pictures}</div>"
        f"<h3>Time</h3>{_table(['stage', 'seconds'], timings, 'time')}"
        f"<h3>Use it</h3><pre>{escape(how_to_use(run))}</pre>"
        f"<details><summary>Full recipe</summary><pre>{escape(run.recipe)}</pre></details></section>"
    )


def _suggestions(found: Diagnosis) -> str:
    texts = found.suggestions()
    if not texts:
        return "<p>No single layer or edge stands out.</p>"
    listed = "".join(f"<li><code>{escape(text)}</code></li>" for text in texts)
    return (
        "<p>To spend bits where they help most, add one of these to <code>zsq quantize</code>, each of which does what "
        f"those above it do (or change the bits file where they say so):</p><ul>{listed}</ul>"
    )


def layer_table(found: Diagnosis) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of layers and edges."""
    header = [
        "item",
        "kind",
        "bits",
        "gain if float",
        "alone",
        "SQNR dB",
        "clipped %",
        "unused codes %",
    ]
    rows = [
        [
            item.name, item.kind, str(item.bits), f"{found.gain(item):.4g}", f"{item.only:.4g}",
            "" if item.sqnr is None else f"{item.sqnr:.1f}", f"{100 * item.clipped:.2f}",
            f"{100 * item.unused:.0f}",
        ]
        for item in found.items
    ]  # fmt: skip
    return header, rows


def how_to_use(run: RunFacts) -> str:
    """Say how the result is loaded and deployed."""
    shape = "the network's input shape"
    return (
        "# deploy: any ONNX Runtime from 1.27 on, no zsq needed\n"
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{run.name}/model.onnx")\n'
        f"logits = session.run(None, {{session.get_inputs()[0].name: x}})[0]  # x: float32, {shape}\n\n"
        "# study: the simulation, as a torch module, without the model's own code\n"
        "import zsq\n"
        f'student = zsq.load("{run.name}")\n'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    head = "".join(f"<th scope=col><button>{escape(text)}</button></th>" for text in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<div class=scroll><table id='{name}' class=sortable><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def markdown(runs: list[RunFacts]) -> str:
    """Render the summary."""
    header, rows = comparison(runs)
    lines = [f"# Quantized without data: {plain(', '.join(run.name for run in runs))}", ""]
    for note in filter(None, (protocols_note(runs), data_note(runs))):
        lines += [f"**{note}**", ""]
    lines += markdown_table(header, rows)
    for run in runs:
        lines += ["", f"## {plain(run.name)}", ""]
        lines += [f"* {name}: {plain(value)}" for name, value in settings_of(run).items() if value]
        lines += [f"* **{text}**" for text in run.warnings]
        lines += ["", "What hurts most:", ""]
        found_header, found_rows = layer_table(run.diagnosis)
        lines += markdown_table(found_header, found_rows[:10])
        lines += ["", *(f"    {text}" for text in run.diagnosis.suggestions())]
    return "\n".join(lines) + "\n"
