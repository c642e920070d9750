# SPDX-License-Identifier: Apache-2.0
"""Analyses of a finished run, from its folder alone."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from zsq.analysis.layers import Diagnosis, diagnose_student
from zsq.artifact.networkfile import load_saved_teacher, load_student
from zsq.artifact.runfolder import RunFolder
from zsq.bits.plan import BitsPlan
from zsq.config import Override, Recipe
from zsq.errors import UsageError
from zsq.preparation import equalization_steps, prepared_teacher
from zsq.runtime.ambient import own_modes
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.files import atomic_write
from zsq.student import prepared_network
from zsq.synthesis.images import ImageSet
from zsq.teacher.inspect import count_macs
from zsq.teacher.teacher import Teacher

#: Images that a diagnosis looks at.
IMAGES = 64
#: Seconds that a diagnosis within a report may take on a small machine, about.
AFFORDABLE = 60.0
#: What such a machine does in a second: multiply-accumulates, and elements written by operators.
MACS_A_SECOND, ELEMENTS_A_SECOND = 5e10, 1e8


@own_modes()
def diagnose(
    run: str | Path, *, images: int | None = IMAGES, context: Context | None = None
) -> Diagnosis:  # fmt: skip
    """Find out which layers of a run hurt, and write ``diagnosis.json`` and its picture.

    Args:
        run: the folder that `quantize` wrote.
        images: how many of its images to look at; None: what takes about a minute, at most 64.
        context: device and progress.

    Returns:
        Every weight and edge, by what leaving it float would gain.

    Raises:
        UsageError: no finished run, or no image to look at.
    """
    if images is not None and images < 1:
        raise UsageError(f"{images} images are none to look at; give at least 1.")
    folder = RunFolder.open(run)
    student = load_student(folder.require("student.safetensors"))
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    pictures = ImageSet.load(folder.require("images.safetensors")).check(student.info.input_shape)
    prepared = prepared_teacher(teacher, student.recipe, pictures, kept_in(folder, student.recipe))
    network = prepared_network(prepared, student.recipe)
    if images is None:
        images = affordable_images(teacher, len(student.layers()) + len(student.quantizers()))
    found = diagnose_student(student, network, pictures.images[:images], context)
    found = replace(found, planned=_planned(folder))
    if folder.is_writable():
        folder.write_text("diagnosis.json", json.dumps(found.to_dict(), indent=1) + "\n")
        with atomic_write(folder.file("diagnosis.png")) as temporary:
            found.plot().savefig(temporary, format="png", dpi=150)
    return found


def _planned(folder: RunFolder) -> tuple[Override, ...]:
    """Return the overrides that a run's bits file makes; none where it has none that can be read."""
    with suppress(UsageError):
        plan = BitsPlan.load(folder.file("bits.yaml"))
        return (*plan.of_layers(), *plan.of_edges())
    return ()


def kept_in(folder: RunFolder, recipe: Recipe) -> Context:
    """Return surroundings whose checkpoints are what a run kept of its own: how it was equalized.

    Raises:
        UsageError: it is not there, and learned anew it would be another student's.
    """
    if equalization_steps(recipe):
        folder.require("equalization.safetensors")
    return Context(checkpoints=Checkpoints(folder.path))


def affordable_images(teacher: Teacher, items: int) -> int:
    """Return how many images a diagnosis can look at within about a minute of a small machine.

    Computed from the network alone, so that a report does not depend on what else runs.

    Args:
        teacher: the float network.
        items: weights and edges; each takes two passes.
    """
    macs = sum(count_macs(teacher.network, teacher.info.input_shape).values())
    counter = _Elements(teacher.network)
    with torch.no_grad():
        counter.run(torch.zeros(1, *teacher.info.input_shape))
    one = macs / MACS_A_SECOND + counter.count / ELEMENTS_A_SECOND
    return max(8, min(IMAGES, int(AFFORDABLE / (2 * items * one))))


class _Elements(Interpreter):
    """Counts the elements that a network's operators write."""

    count = 0

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.count += result.numel() if isinstance(result, Tensor) else 0
        return result
