# SPDX-License-Identifier: Apache-2.0
"""The whole way: load, synthesise, attach, tune, save, export. Each stage is one public verb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from zsq.artifact.given import Places, known_to_all
from zsq.artifact.identity import check_agreement, run_identity
from zsq.artifact.networkfile import load_student, save_student
from zsq.artifact.runfolder import RunFolder
from zsq.bits.plan import BitsPlan, read_plan
from zsq.config import Recipe, is_large, load_recipe
from zsq.export.parity import ExportReport
from zsq.requests import check_request, warn_of_floating
from zsq.running import carry_out, export_run, make_student
from zsq.runtime.ambient import own_modes
from zsq.runtime.amounts import parse_memory
from zsq.runtime.checkpoints import SharedCheckpoints
from zsq.runtime.context import Context
from zsq.runtime.files import check_destination
from zsq.runtime.group import Group
from zsq.runtime.metrics import HeldRecords
from zsq.runtime.policy import Precision, make_policy, on_device
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.runtime.seeds import whole_seed
from zsq.stages import produce
from zsq.student import Student
from zsq.synthesis.images import Images
from zsq.teacher.teacher import load_teacher, shape_of


@own_modes()
def quantize(
    model: str | nn.Module | torch.export.ExportedProgram,
    recipe: str | Path | Recipe = "genie",
    *,
    bits: str | Path | BitsPlan | None = None,
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
    images_from: Places = None,
    seed: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
    compile: bool = True,
    cuda_graphs: bool = False,
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
        bits: like ``w4a4``, or a bits file of `zsq bits` or what `choose_bits` returned, made under the same
            protocol; None keeps the recipe's.
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
        images_from: the images of another run: its folder, or its ``images.safetensors``; a list of these
            puts their images together.
        seed: every random draw derives from it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of the passes of synthesis and tuning: ``auto`` is bf16 where the hardware has it.
        compile: allow `torch.compile` for loops long enough to repay it.
        cuda_graphs: replay compiled loops as CUDA graphs; needs a GPU. Not tried on one yet.
        memory: most that block inputs, and a step of GENIE's synthesis, may take on the host, in bytes or
            like ``"8GB"``; None is half of the machine's. Results depend on it by rounding alone, where a
            batch of that synthesis passes in slices.
        out: folder for the run; with it the run can be resumed and an ONNX file is exported.
        resume: go on with an interrupted run in ``out``, or make again what is missing of a
            finished one.
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
    group, seed = group or Group(), whole_seed(seed)
    with group.one_first():
        teacher = load_teacher(
            model, input_shape=input_shape, mean=mean, std=std, resize=resize, weights=weights,
            allow_pickle=allow_pickle,
        )  # fmt: skip
    plan = read_plan(bits)
    resolved = load_recipe(
        recipe, schedule=schedule, large=is_large(teacher.info.input_shape),
        settings=settings, protocol=protocol, bits=plan.widths() if plan else bits,
    )  # fmt: skip
    if plan is not None:
        resolved = load_recipe(resolved, overrides=plan.overrides(teacher, resolved))
    images = known_to_all(group, images, images_from)
    begun = out is not None and (Path(out) / "run.json").exists()
    if not begun:  # else it was checked when it was
        check_request(teacher, resolved, images, group)
    policy = make_policy(
        device, precision, compile, None if memory is None else parse_memory(memory), cuda_graphs
    )
    policy = replace(policy, dtype=group.send(policy.dtype, 0))
    context = Context(
        seed, policy, (reporter if group.rank == 0 else None) or QuietReporter(), group=group
    )
    with on_device(policy.device):
        if out is not None and not begun:
            warn_of_floating(teacher, resolved, context.reporter)
        identity = run_identity(teacher, resolved, seed, policy, images)
        check_agreement(identity, group)
        if out is None:
            return produce(teacher, resolved, images, context)[0].to("cpu")
        if group.rank:
            checkpoints = SharedCheckpoints(None, group)
            context = replace(context, checkpoints=checkpoints, metrics=HeldRecords())
            return make_student(None, teacher, resolved, images, context)
        folder = RunFolder.start(out, identity, resume=resume)
        if resume and folder.begun:
            context.reporter.note(f"{out} holds no run to go on with; it begins there")
        try:
            return carry_out(folder, teacher, resolved, images, context, plan=plan, report=report)
        finally:
            folder.release()


@own_modes(alone=False)
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


@own_modes()
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
        UsageError: unknown target, no finished run, a name that does not end in ``.onnx``, or a place where
            no file can be written.
        RunError: layers did not fuse, or the file could not be written.
    """
    folder = RunFolder.open(run)
    destination = Path(path) if path is not None else folder.file("model.onnx")
    check_destination(destination, (".onnx",))
    report = export_run(folder, target, destination, allow_partial, reporter)
    if folder.is_writable():
        folder = RunFolder.open(run)  # meanwhile it may have been evaluated
        folder.record["results"]["export"] = report.to_dict()
        folder.save()
    elif reporter is not None:
        reporter.note(f"the folder {folder.path} cannot be written: the result is not kept in it")
    return report
