# SPDX-License-Identifier: Apache-2.0
"""What a run with a folder does: each stage unless its result is there, so that it can be resumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from zsq.artifact.networkfile import (
    load_saved_teacher,
    load_shared_student,
    load_student,
    save_student,
    save_teacher,
)
from zsq.artifact.report import write_report
from zsq.artifact.runfolder import RunFolder
from zsq.artifact.wholeness import check_files, has_report, is_complete
from zsq.bits.plan import BitsPlan
from zsq.bits.plots import write_plan
from zsq.config import Recipe, to_yaml
from zsq.errors import RunError, UsageError
from zsq.export.export import export_student
from zsq.export.parity import ExportReport
from zsq.preparation import equalization_steps, prepared
from zsq.runtime.checkpoints import SharedCheckpoints
from zsq.runtime.context import Context
from zsq.runtime.files import atomic_write
from zsq.runtime.metrics import MetricsLog
from zsq.runtime.progress import Reporter
from zsq.stages import choose_images, learns_together, produce, tuned
from zsq.student import Student, prepared_network
from zsq.synthesis.images import Images, ImageSet
from zsq.teacher.teacher import Teacher
from zsq.together import first_images

#: Images that calibrate extra edges and judge parity at export.
EXPORT_IMAGES = 256


def carry_out(
    folder: RunFolder, teacher: Teacher, recipe: Recipe, images: Images, context: Context, *,
    plan: BitsPlan | None = None, report: bool = True,
) -> Student:  # fmt: skip
    """Do what is missing of a run; return the student.

    Args:
        folder: of the run; on process 0 of a group only.
        teacher: to quantize.
        recipe: resolved.
        images: to use, or None.
        context: its checkpoints and metrics become those of the folder.
        plan: of bits, to keep with the run.
        report: write one, unless it is there and nothing was missing.

    Raises:
        UsageError: a file of the folder is damaged, or something about the request cannot work.
        RunError: a stage failed.
    """
    check_files(folder)
    complete = is_complete(folder)
    if not complete:
        folder.record["processes"] = context.group.size
    with _withdrawn_if_impossible(folder), MetricsLog(folder.file("metrics.jsonl")) as metrics:
        checkpoints = SharedCheckpoints(folder.file("checkpoints"), context.group)
        context = replace(context, checkpoints=checkpoints, metrics=metrics)
        student = _stages(folder, teacher, recipe, images, context)
    if plan is not None and not complete:
        write_plan(plan, folder.path)
    folder.finish()
    if report and not (complete and has_report(folder)):
        write_report([folder.path], reporter=context.reporter)
    return student


@contextmanager
def _withdrawn_if_impossible(folder: RunFolder) -> Iterator[None]:
    """Let a request that cannot work, and of which nothing was made, leave no folder behind.

    It would hold "another run" when the request is repeated as the error advises.
    """
    try:
        yield
    except UsageError:
        folder.withdraw()
        raise


def _stages(
    folder: RunFolder, teacher: Teacher, recipe: Recipe, images: Images, context: Context
) -> Student:
    folder.write_text("recipe.yaml", to_yaml(recipe))
    if not folder.file("teacher.safetensors").exists():
        save_teacher(teacher, folder.file("teacher.safetensors"))
    student = make_student(folder, teacher, recipe, images, context)
    files = [folder.file(name) for name in ("model.onnx", "integer.safetensors")]
    if "export" not in folder.record["results"] or not all(file.exists() for file in files):
        with _timed(folder, "export"):
            export_run(folder, "ort-cpu", files[0], False, context.reporter)
    return student


def make_student(
    folder: RunFolder | None, teacher: Teacher, recipe: Recipe, images: Images, context: Context
) -> Student:
    """Write a run's images and its student, each unless it is there; return the student.

    All processes of a group call this; ``folder`` is None on those that write nothing.
    """
    group = context.group
    pictures, result = (
        folder.file(name) if folder else Path() for name in ("images.safetensors", "student.safetensors")
    )  # fmt: skip
    have_images, have_student = group.from_first(lambda: (pictures.exists(), result.exists()))
    if learns_together(recipe, images):
        # Images of a generator that learns with the student are to be had with the student only.
        if not (have_images and have_student):
            with _timed(folder, "tuning"):
                student, chosen = produce(teacher, recipe, None, context)
            _save_images(folder, chosen)
            _save_student(folder, student)
        elif equalization_steps(recipe):
            _learn_again(
                folder, teacher, recipe, context, lambda quiet: first_images(teacher, recipe, quiet)
            )
    else:
        if not have_images:
            with _timed(folder, "images"):
                chosen = choose_images(teacher, recipe, images, context)
            _save_images(folder, chosen)
        if not have_student:
            with _timed(folder, "tuning"):
                chosen = ImageSet.shared(group, lambda: ImageSet.load(pictures))
                student = tuned(teacher, recipe, chosen, context)
            _save_student(folder, student)
        elif equalization_steps(recipe):
            _learn_again(
                folder, teacher, recipe, context,
                lambda quiet: ImageSet.shared(group, lambda: ImageSet.load(pictures)),
            )  # fmt: skip
    return load_shared_student(result, group)


def _learn_again(
    folder: RunFolder | None, teacher: Teacher, recipe: Recipe, context: Context,
    images: Callable[[Context], ImageSet],
) -> None:  # fmt: skip
    """Make the file again that says how a finished student's channels were equalized, if it is lost."""
    group = context.group
    quiet = replace(context, metrics=None)  # losses were recorded the first time
    kept = group.from_first(lambda: folder and folder.file("equalization.safetensors").exists())
    if not kept:
        prepared(teacher, recipe, images(quiet), quiet)
        if folder is not None:
            _keep_for_analysis(folder)


def export_run(
    folder: RunFolder, target: str, destination: Path, allow_partial: bool,
    reporter: Reporter | None,
) -> ExportReport:  # fmt: skip
    """Export a run's student, check the file, and note in the record what was found (not saved)."""
    student = load_student(folder.require("student.safetensors"))
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    images = ImageSet.load(folder.require("images.safetensors"))
    float_network = prepared_network(
        teacher, student.recipe.model_copy(update={"fold_batch_norm": True})
    )
    if reporter is not None:
        reporter.note("export: writing the ONNX file and running it against the simulation")
    report, integer = export_student(
        student, float_network, images.images[:EXPORT_IMAGES], destination,
        target=target, allow_partial=allow_partial,
    )  # fmt: skip
    if folder.is_writable():
        save_student(integer, folder.file("integer.safetensors"))
    folder.record["results"]["export"] = report.to_dict()
    return report


@contextmanager
def _timed(folder: RunFolder | None, stage: str) -> Iterator[None]:
    """Note how long the block took, also when it fails: a resumed run adds to it."""
    start = time.perf_counter()

    def note() -> None:
        if folder is not None:
            folder.note_time(stage, time.perf_counter() - start)
            folder.save()

    try:
        yield
    except BaseException:
        with suppress(RunError):  # a full disk refuses this file too; the first error is to be seen
            note()
        raise
    note()


def _save_images(folder: RunFolder | None, images: ImageSet) -> None:
    if folder is not None:
        images.save(folder.file("images.safetensors"))


def _save_student(folder: RunFolder | None, student: Student) -> None:
    if folder is None:
        return
    _keep_for_analysis(folder)
    if folder.record["results"].pop("export", None):  # another student's, by rounding at least
        folder.save()
    save_student(student.to("cpu"), folder.file("student.safetensors"))


def _keep_for_analysis(folder: RunFolder) -> None:
    """Take what is looked at later out of the checkpoints, which end with the run."""
    learned = folder.file("checkpoints") / "equalization.safetensors"
    if learned.exists():  # a copy: until the student is saved, a resumed run needs it too
        with atomic_write(folder.file(learned.name)) as temporary:
            shutil.copyfile(learned, temporary)
    for snapshot in sorted(folder.file("checkpoints").glob("path_*.safetensors")):
        folder.file("path").mkdir(exist_ok=True)
        snapshot.replace(folder.file("path") / snapshot.name)
