# SPDX-License-Identifier: Apache-2.0
"""Analyses of a finished run, from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path

from zsq.analysis.layers import Diagnosis, diagnose_student
from zsq.artifact.networkfile import load_saved_teacher, load_student
from zsq.artifact.runfolder import RunFolder
from zsq.runtime.context import Context
from zsq.runtime.files import atomic_write
from zsq.stages import prepared_teacher
from zsq.student import prepared_network
from zsq.synthesis.images import ImageSet
from zsq.teacher.inspect import count_macs
from zsq.teacher.teacher import Teacher

#: Images that a diagnosis looks at.
IMAGES = 64
#: Multiply-accumulates that a diagnosis within a report may cost.
AFFORDABLE_MACS = 2e13


def diagnose(
    run: str | Path, *, images: int = IMAGES, context: Context | None = None
) -> Diagnosis:  # fmt: skip
    """Find out which layers of a run hurt, and write ``diagnosis.json`` and its picture.

    Args:
        run: the folder that `quantize` wrote.
        images: how many of its images to look at.
        context: device and progress.

    Returns:
        Every weight and edge, by what leaving it float would gain.

    Raises:
        UsageError: no finished run.
    """
    folder = RunFolder.open(run)
    student = load_student(folder.require("student.safetensors"))
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    pictures = ImageSet.load(folder.require("images.safetensors"))
    prepared = prepared_teacher(teacher, student.recipe, pictures)
    network = prepared_network(prepared, student.recipe)
    found = diagnose_student(student, network, pictures.images[:images], context)
    folder.write_text("diagnosis.json", json.dumps(found.to_dict(), indent=1) + "\n")
    with atomic_write(folder.file("diagnosis.png")) as temporary:
        found.plot().savefig(temporary, format="png", dpi=150)
    return found


def affordable_images(teacher: Teacher) -> int:
    """Return how many images a diagnosis can look at within about a minute of a small machine."""
    macs = count_macs(teacher.network, teacher.info.input_shape)
    passes = 6 * len(macs)  # every layer and its edges, alone and left out
    return max(8, min(IMAGES, int(AFFORDABLE_MACS / max(passes * sum(macs.values()), 1))))
