# SPDX-License-Identifier: Apache-2.0
"""What a report says about a run, as plain data and pictures."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsq.analysis.history import agreement, crossings, loss_history
from zsq.analysis.imagegrid import image_grid
from zsq.analysis.images import examine_images
from zsq.analysis.layers import Diagnosis
from zsq.analysis.runs import diagnose
from zsq.artifact.networkfile import load_saved_teacher
from zsq.artifact.runfolder import RunFolder
from zsq.evaluation.folder import load_images, open_for
from zsq.runtime.amounts import size
from zsq.runtime.context import Context
from zsq.runtime.metrics import read_metrics
from zsq.runtime.progress import Reporter
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows in words."""

    title: str
    text: str
    png: bytes

    def url(self) -> str:
        """Return the picture as a data URL, so that a page needs no second file."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report shows of one run.

    Attributes:
        name: of the run's folder.
        record: ``run.json``.
        images: how many there are, and how they were made.
        recipe: ``recipe.yaml`` as it was written.
        diagnosis: of the layers.
        pictures: plots and images.
        warnings: sentences a reader must not miss.
    """

    name: str
    record: dict[str, Any]
    images: str
    recipe: str
    diagnosis: Diagnosis
    pictures: tuple[Picture, ...]
    warnings: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What decided the run's result."""
        return self.record["identity"]  # type: ignore[no-any-return]


def collect_facts(run: str | Path, reporter: Reporter, real: str | Path | None = None) -> RunFacts:
    """Read a run's folder, diagnose its layers and look at its images.

    Raises:
        UsageError: no finished run, or no readable folder of real images.
    """
    folder = RunFolder.open(run)
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    images = ImageSet.load(folder.require("images.safetensors")).check(teacher.info.input_shape)
    found = diagnose(run, images=None, context=Context(reporter=reporter))
    looks = examine_images(teacher, images, _real(teacher, real, len(images)))
    pictures = [*_history(folder), _picture(
        "Images", "Batch norm statistics they reproduce, classes they show, how sure the teacher is.",
        looks.plot(),
    ), _grid(teacher, images), _picture(
        "What hurts", "Divergence from the teacher that leaving one item float removes.", found.plot()
    ), *_saved(folder)]  # fmt: skip
    name = folder.path.resolve().name
    recipe = folder.require("recipe.yaml").read_text(encoding="utf-8")
    made = f"{images.provenance.get('method', 'of unknown origin')}, {len(images)}"
    return RunFacts(
        name, folder.record, made, recipe, found, tuple(pictures), tuple(looks.warnings)
    )


def check_facts(run: str | Path, real: str | Path | None = None) -> None:
    """Find out what `collect_facts` would find missing after its diagnosis.

    Raises:
        UsageError: as there.
    """
    folder = RunFolder.open(run)
    for name in ("student.safetensors", "images.safetensors", "recipe.yaml"):
        folder.require(name)
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    if real is not None:
        open_for(teacher.info, real)


def _real(teacher: Teacher, folder: str | Path | None, count: int) -> ImageSet | None:
    """Read as many real images as there are synthetic ones: distances shrink as a set grows."""
    if folder is None:
        return None
    opened = open_for(teacher.info, folder)
    pixels, labels = load_images(opened, min(count, len(opened)), 0)
    return ImageSet(pixels, labels, {"method": "real"})


def _history(folder: RunFolder) -> list[Picture]:
    """Draw what the run recorded over time."""
    path = folder.file("metrics.jsonl")
    records = read_metrics(path) if path.exists() else []
    found = []
    losses = loss_history(records)
    if losses.stages:
        found.append(_picture("Losses", "Every term over the steps of its stage.", losses.plot()))
    agreed, moved = agreement(records), crossings(records)
    if agreed is not None:
        text = (
            f"Cosine between the gradients of {agreed.terms.replace(',', ' and ')}: mean {agreed.mean:.3f}, "
            f"below zero at {100 * agreed.opposed:.0f} % of the recorded steps."
        )
        found.append(_picture("Do the losses agree?", text, agreed.plot()))
    if moved is not None:
        text = "Share of each layer's integers that a step changed, the step's multiplier, what never moved."
        found.append(_picture("Integers that change", text, moved.plot()))
    return found


def _saved(folder: RunFolder) -> list[Picture]:
    """Return the pictures that other commands left with the run."""
    texts = {"bits_frontier.png": "Best choices of bits per layer, and the one that was taken.",
             "bits_sensitivity.png": "Divergence with one layer rounded, per layer and width.",
             "analysis/curvature.png": "Of every loss, in the student's weights.",
             "analysis/surface_line.png": "Every loss along a random direction.",
             "analysis/surface_plane.png": "Every loss over two random directions.",
             "analysis/surface_path.png": "Every loss around the student, over directions of training."}  # fmt: skip
    return [
        Picture(
            "Bits per layer" if "bits" in name else "Landscape",
            text,
            folder.file(name).read_bytes(),
        )
        for name, text in texts.items()
        if folder.file(name).exists()
    ]


def _grid(teacher: Teacher, images: ImageSet) -> Picture:
    from PIL import Image

    pixels = image_grid(images, mean=teacher.info.mean, std=teacher.info.std)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.numpy())
    factor = max(1, 720 // max(picture.width, 1))
    picture = picture.resize((picture.width * factor, picture.height * factor), 0)
    picture.save(buffer, format="PNG")
    return Picture("What it was tuned on", "One row per class, as labelled.", buffer.getvalue())


def _picture(title: str, text: str, figure: Figure) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Picture(title, text, buffer.getvalue())


def data_note(runs: list[RunFacts]) -> str:
    """Say that accuracies on different images are no contest; nothing where all were measured on the same."""
    measured = [run.record["results"].get("evaluation") for run in runs]
    folders = list(dict.fromkeys(os.path.realpath(scores["data"]) for scores in measured if scores))
    if len(folders) < 2:
        return ""
    return (
        f"These runs were evaluated on different images ({', '.join(folders)}): their accuracies are not to be "
        "compared with each other; `zsq evaluate RUN --data FOLDER` measures them on one folder."
    )


def comparison(runs: list[RunFacts]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table that sets runs and FP32 side by side."""
    header = ["network", "protocol", "bits", "top-1 %", "top-5 %", "drop", "agreement %", "file", "smaller",
              "ms an image", "faster", "minutes"]  # fmt: skip
    rows: list[list[str]] = []
    shown: set[str] = set()
    for run in runs:
        results = run.record["results"]
        scores, export = results.get("evaluation", {}), results.get("export", {})
        if run.identity["network"] not in shown:
            shown.add(run.identity["network"])
            rows.append(_float_row(_best_known(run, runs), export))
        rows.append(_run_row(run, scores, export))
    return header, rows


def _best_known(run: RunFacts, runs: list[RunFacts]) -> RunFacts:
    """Return the first run of the same network that was evaluated, or the run itself."""
    alike = (other for other in runs if other.identity["network"] == run.identity["network"])
    return next((other for other in alike if "evaluation" in other.record["results"]), run)


def _float_row(run: RunFacts, export: dict[str, Any]) -> list[str]:
    scores = run.record["results"].get("evaluation", {})
    return [
        f"FP32: {run.identity['model']}", "", "32", *_accuracy(scores.get("teacher")), "", "",
        _bytes(export.get("float_bytes")), "", _number(export.get("float_latency_ms"), 3), "", "",
    ]  # fmt: skip


def _run_row(run: RunFacts, scores: dict[str, Any], export: dict[str, Any]) -> list[str]:
    recipe = run.identity["recipe"]
    bits = recipe["bits"]
    drop = scores.get("drop")
    return [
        f"{run.name} ({recipe['name']})", recipe["protocol"],
        f"w{bits['weights']}a{bits['activations']}{' mixed' if recipe['overrides'] else ''}",
        *_accuracy(scores.get("student")),
        f"{drop['points']:.2f} ± {drop['stderr']:.2f}" if drop else "",
        _number(scores.get("agreement"), 2), _bytes(export.get("bytes")),
        f"{export['ratio']:.1f}x" if export else "", _number(export.get("latency_ms"), 3),
        f"{export['speedup']:.1f}x" if export else "",
        _number(sum(run.record["timings"].values()) / 60, 1),
    ]  # fmt: skip


def _accuracy(score: dict[str, Any] | None) -> list[str]:
    if score is None:
        return ["not measured", ""]
    return [f"{score['top1']:.2f} ± {score['stderr']:.2f}", f"{score['top5']:.2f}"]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _bytes(count: float | None) -> str:
    return "" if count is None else size(count)


def settings_of(run: RunFacts) -> dict[str, str]:
    """Return a run's settings in a few words."""
    identity = run.identity
    recipe, environment = identity["recipe"], run.record["environment"]
    tuning = recipe["tuning"]
    return {
        "model": str(identity["model"]), "recipe": f"{recipe['name']}: {recipe['title']}",
        "paper": str(recipe["paper"]), "protocol": str(recipe["protocol"]),
        "images": f"{identity['images']} ({run.images})",
        "tuning": f"{tuning['method']}, {tuning.get('steps', 0)} steps", "seed": str(identity["seed"]),
        "device": f"{identity['device']}, {identity['precision']}",
        "evaluated on": str(run.record["results"].get("evaluation", {}).get("data", "")),
        "environment": ", ".join(
            f"{name} {_version(environment[name])}"
            for name in ("zsq", "torch", "onnxruntime", "python", "platform")
            if environment.get(name)
        ),
    }  # fmt: skip


def _version(found: object) -> str:
    return str(found.get("version")) if isinstance(found, dict) else str(found)
