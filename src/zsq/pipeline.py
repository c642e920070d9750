# SPDX-License-Identifier: Apache-2.0
"""The whole way: load, synthesise, attach, tune, save, export. Each stage is one public verb."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from zsq.artifact.given import known_to_all
from zsq.artifact.identity import check_agreement, run_identity
from zsq.artifact.networkfile import (
    load_saved_teacher,
    load_shared_student,
    load_student,
    save_student,
    save_teacher,
)
from zsq.artifact.report import write_report
from zsq.artifact.runfolder import RunFolder
from zsq.bits.plan import read_plan
from zsq.bits.plots import write_plan
from zsq.config import LARGE_SIDE, Recipe, load_recipe, to_yaml
from zsq.export.export import export_student
from zsq.export.parity import ExportReport
from zsq.runtime.checkpoints import SharedCheckpoints
from zsq.runtime.context import Context
from zsq.runtime.group import Group
from zsq.runtime.metrics import HeldRecords, MetricsLog
from zsq.runtime.policy import Precision, make_policy
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.runtime.shelf import parse_memory
from zsq.stages import Images, choose_images, learns_together, produce, tuned
from zsq.student import Student, prepared_network
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher, load_teacher, shape_of

#: Images that calibrate extra edges and judge parity at export.
EXPORT_IMAGES = 256


def quantize(
    model: str | nn.Module | torch.export.ExportedProgram,
    recipe: str | Path | Recipe = "genie",
    *,
    bits: str | None = None,
    protocol: str | None = None,
    schedule: Literal["quick", "full"] = "full",
    settings: Sequence[str] = (),
    example_inputs: Tensor | None = None,
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resize: int | None = None,
    weights: str | None = None,
    allow_pickle: bool = False,
    images: Images = None,
    images_from: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
    compile: bool = True,
    memory: int | str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    report: bool = True,
    reporter: Reporter | None = None,
    group: Group | None = None,
) -> Student:
    """Quantize a trained network without its data.

    Args:
        model: a MODEL string (``pytorchcv:resnet20_cifar10``, ``file.py:function``, ``net.pt2``,
            ``zsq:resnet20_cifar10``, ...), a module, or an exported program. Not changed.
        recipe: name of a recipe, a YAML file, or a `Recipe`.
        bits: like ``w4a4``, or a bits file of `zsq bits`, made under the same protocol; None keeps the
            recipe's.
        protocol: ``edges-8bit``, ``integer`` or ``all-low-bit``; None keeps the recipe's.
        schedule: ``full`` as published, ``quick`` for a laptop.
        settings: ``KEY=VALUE`` changes of recipe fields.
        example_inputs: a batch (N, C, H, W) that tells the input shape.
        input_shape: (C, H, W), alternatively.
        mean: normalisation mean per channel; needed only with a folder of real images.
        std: normalisation standard deviation, likewise.
        resize: short side to resize such images to before the centre crop, likewise.
        weights: a checkpoint to load into the model, or ``random``.
        allow_pickle: read checkpoints that run code when read.
        images: real images instead of synthetic ones: an `ImageSet`, a normalised tensor
            (N, C, H, W), or an ImageFolder's path.
        images_from: the images of another run: its folder, or its ``images.safetensors``.
        seed: every random draw derives from it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of synthesis: ``auto`` is bf16 where the hardware has it.
        compile: allow `torch.compile` for loops long enough to repay it.
        memory: most that block inputs, and a step of GENIE's synthesis, may take on the host, in bytes or
            like ``"8GB"``; None is half of the machine's. Results do not depend on it.
        out: folder for the run; with it the run can be resumed and an ONNX file is exported.
        resume: go on with an interrupted run in ``out``.
        report: diagnose the layers and write ``report.html`` into ``out`` at the end.
        reporter: progress; quiet by default.
        group: the processes that share the run, from `zsq.runtime.joining.joined`; each makes the same
            call and gets the same student, process 0 writes. The result does not depend on their
            number but for rounding and chance.

    Returns:
        The quantized network, a `torch.nn.Module` on the CPU.

    Raises:
        UsageError: anything about the request that cannot work.
        RunError: a loss became NaN, the disk is full, the exported file disagrees.
    """
    if example_inputs is not None and input_shape is None:
        input_shape = shape_of(example_inputs)
    group = group or Group()
    with group.one_first():
        teacher = load_teacher(
            model, input_shape=input_shape, mean=mean, std=std, resize=resize, weights=weights,
            allow_pickle=allow_pickle,
        )  # fmt: skip
    plan = read_plan(bits)
    resolved = load_recipe(
        recipe, schedule=schedule, large=max(teacher.info.input_shape[1:]) >= LARGE_SIDE,
        settings=settings, protocol=protocol, bits=plan.widths() if plan else bits,
    )  # fmt: skip
    if plan is not None:
        resolved = load_recipe(resolved, overrides=plan.overrides(teacher, resolved))
    images = known_to_all(group, images, images_from)
    policy = make_policy(
        device, precision, compile, None if memory is None else parse_memory(memory)
    )
    policy = replace(policy, dtype=group.send(policy.dtype, 0))
    context = Context(
        seed, policy, (reporter if group.rank == 0 else None) or QuietReporter(), group=group
    )
    identity = run_identity(teacher, resolved, seed, policy, images)
    check_agreement(identity, group)
    if out is None:
        return produce(teacher, resolved, images, context)[0].to("cpu")
    if group.rank:
        checkpoints = SharedCheckpoints(None, group)
        context = replace(context, checkpoints=checkpoints, metrics=HeldRecords())
        return _produce(None, teacher, resolved, images, context)
    folder = RunFolder.start(out, identity, resume=resume)
    folder.record["processes"] = group.size
    with MetricsLog(folder.file("metrics.jsonl")) as metrics:
        checkpoints = SharedCheckpoints(folder.file("checkpoints"), group)
        context = replace(context, checkpoints=checkpoints, metrics=metrics)
        student = _run(folder, teacher, resolved, images, context)
    if plan is not None:
        write_plan(plan, folder.path)
    folder.finish()
    if report:
        write_report([folder.path], reporter=context.reporter)
    return student


@contextmanager
def _timed(folder: RunFolder | None, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        if folder is not None:
            folder.note_time(stage, time.perf_counter() - start)
            folder.save()


def _run(
    folder: RunFolder, teacher: Teacher, recipe: Recipe, images: Images, context: Context
) -> Student:
    """All stages of a run with a folder; finished ones are read back."""
    folder.write_text("recipe.yaml", to_yaml(recipe))
    if not folder.file("teacher.safetensors").exists():
        save_teacher(teacher, folder.file("teacher.safetensors"))
    student = _produce(folder, teacher, recipe, images, context)
    if not folder.file("model.onnx").exists() or "export" not in folder.record["results"]:
        with _timed(folder, "export"):
            _export(folder, "ort-cpu", folder.file("model.onnx"), False, context.reporter)
    return student


def _produce(
    folder: RunFolder | None, teacher: Teacher, recipe: Recipe, images: Images, context: Context
) -> Student:
    """Write a run's images and its student, each unless it is there; return the student.

    All processes of a group call this; ``folder`` is None on those that write nothing.
    """
    group = context.group
    pictures, result = (
        folder.file(name) if folder else Path() for name in ("images.safetensors", "student.safetensors")
    )  # fmt: skip
    if not group.from_first(result.exists):
        if learns_together(recipe, images):
            with _timed(folder, "tuning"):
                student, chosen = produce(teacher, recipe, None, context)
            _save_images(folder, chosen)
        else:
            if not group.from_first(pictures.exists):
                with _timed(folder, "images"):
                    chosen = choose_images(teacher, recipe, images, context)
                _save_images(folder, chosen)
            with _timed(folder, "tuning"):
                chosen = ImageSet.shared(group, lambda: ImageSet.load(pictures))
                student = tuned(teacher, recipe, chosen, context)
        if folder is not None:
            _keep_snapshots(folder)
            save_student(student.to("cpu"), result)
    return load_shared_student(result, group)


def _save_images(folder: RunFolder | None, images: ImageSet) -> None:
    if folder is not None:
        images.save(folder.file("images.safetensors"))


def _keep_snapshots(folder: RunFolder) -> None:
    """Move snapshots of the weights out of the checkpoints, which end with the run."""
    for snapshot in sorted(folder.file("checkpoints").glob("path_*.safetensors")):
        folder.file("path").mkdir(exist_ok=True)
        snapshot.replace(folder.file("path") / snapshot.name)


def load(run: str | Path) -> Student:
    """Load the quantized network of a run; the model's original script is not needed.

    Args:
        run: the folder that `quantize` wrote, or a ``student.safetensors`` file.

    Raises:
        UsageError: unreadable, truncated, or unfinished.
    """
    path = Path(run)
    if path.is_file():
        return load_student(path)
    return load_student(RunFolder.open(path).require("student.safetensors"))


def save(student: Student, path: str | Path) -> None:
    """Save a quantized network as packed integers in one safetensors file that `load` reads."""
    save_student(student, Path(path))


def export(
    run: str | Path,
    *,
    target: str = "ort-cpu",
    path: str | Path | None = None,
    allow_partial: bool = False,
    reporter: Reporter | None = None,
) -> ExportReport:
    """Export a run's network to ONNX, run the file, and compare it with the simulation.

    Args:
        run: the folder that `quantize` wrote.
        target: the runtime to place quantizers for.
        path: the file to write; ``model.onnx`` in the run folder by default.
        allow_partial: accept a file in which some layers run in float, or that disagrees.
        reporter: for notes.

    Returns:
        Agreement, fused layers, size and time.

    Raises:
        UsageError: unknown target, or no finished run.
        RunError: layers did not fuse, or the file could not be written.
    """
    folder = RunFolder.open(run)
    destination = Path(path) if path is not None else folder.file("model.onnx")
    report = _export(folder, target, destination, allow_partial, reporter)
    folder.save()
    return report


def _export(
    folder: RunFolder,
    target: str,
    destination: Path,
    allow_partial: bool,
    reporter: Reporter | None,
) -> ExportReport:
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
    save_student(integer, folder.file("integer.safetensors"))
    folder.record["results"]["export"] = report.to_dict()
    return report
