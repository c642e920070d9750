# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a run are there and open, before hours are spent, or none, on the strength of it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from zsq.artifact.runfolder import RunFolder
from zsq.config import Recipe
from zsq.errors import UsageError
from zsq.preparation import equalization_steps
from zsq.runtime.checkpoints import check_tensors

#: What every finished run has beside its record.
TENSORS = (
    "images.safetensors",
    "teacher.safetensors",
    "student.safetensors",
    "integer.safetensors",
)
MODEL = "model.onnx"
#: What those have beside that whose channels were equalized by learned factors.
EQUALIZATION = "equalization.safetensors"


def is_complete(folder: RunFolder) -> bool:
    """Return whether a run is done and all of its results are there."""
    names = ["recipe.yaml", MODEL, *TENSORS]
    if equalization_steps(Recipe.model_validate(folder.record["identity"]["recipe"])):
        names.append(EQUALIZATION)
    there = all(folder.file(name).exists() for name in names)
    return there and folder.record.get("status") == "done"


def has_report(folder: RunFolder) -> bool:
    """Return whether a run's report is there."""
    names = ("report.html", "report.md", "diagnosis.json", "diagnosis.png")
    return all(folder.file(name).exists() for name in names)


def check_files(folder: RunFolder) -> None:
    """Open every file of results that a run has; tensors are not read.

    Raises:
        UsageError: one is truncated or something else; names it.
    """
    for name in (*TENSORS, EQUALIZATION):
        if folder.file(name).exists():
            check_tensors(folder.file(name))
    if folder.file(MODEL).exists():
        _check_model(folder.file(MODEL))


def _check_model(path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen types of its own
        raise UsageError(
            f"{path} cannot be opened by ONNX Runtime ({str(error)[:120]}); it is truncated or damaged. "
            "Delete it and run the same command with --resume to make it again."
        ) from error
