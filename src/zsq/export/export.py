# SPDX-License-Identifier: Apache-2.0
"""The verb: a student goes in, a checked ONNX file comes out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from zsq.errors import RunError, UsageError
from zsq.export.deploy import to_integer
from zsq.export.onnx import export_float, write_integer
from zsq.export.parity import ExportReport, measure
from zsq.export.simulate import IntegerSimulation
from zsq.runtime.files import atomic_write
from zsq.student import Student
from zsq.teacher.fold import fold_batch_norms

_WRITERS: dict[str, Callable[[Student, Path], None]] = {"ort-cpu": write_integer}
TARGETS = tuple(_WRITERS)
#: Per cent of images on which file and simulation must name the same class; one image may always differ.
LEAST_AGREEMENT = 99.9


def export_student(
    student: Student, float_network: GraphModule, images: Tensor, path: Path | str, *,
    target: str = "ort-cpu", allow_partial: bool = False, threads: int | None = None,
    parity_images: int = 256,
) -> tuple[ExportReport, Student]:  # fmt: skip
    """Write a student as an integer ONNX file, run it, and compare it with the simulation.

    Args:
        student: calibrated, of any protocol; edges that its protocol leaves float are quantized to
            8 bits. Stays as it is.
        float_network: the teacher's network, for size and time to compare with.
        images: (N, C, H, W), normalised: calibrate the extra edges and check the file.
        path: the file; appears only when the export succeeded.
        target: one of `TARGETS`.
        allow_partial: accept a file in which some layers run in float, or that disagrees.
        threads: of ONNX Runtime while it is timed; None means one per usable core.
        parity_images: how many of ``images`` are compared.

    Returns:
        What was measured, and the integer student that the file holds (`IntegerSimulation` runs it
        exactly as the file does).

    Raises:
        UsageError: unknown target, wrong images, or a student that is not calibrated.
        RunError: the network cannot be expressed in ONNX, ONNX Runtime refuses the file, layers would
            run in float, or the file disagrees with the simulation.
    """
    if target not in _WRITERS:
        raise UsageError(
            f"export target {target!r} is unknown; choose one of {', '.join(TARGETS)}."
        )
    images = images.detach().cpu().float()
    integer = to_integer(student, images)
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as temporary:
        reference = Path(folder) / "float.onnx"
        export_float(fold_batch_norms(float_network), reference, student.info.input_shape)
        _WRITERS[target](integer, temporary)
        report = measure(
            IntegerSimulation(integer), temporary, reference, images[:parity_images],
            student=student.copy().to("cpu"), target=target, threads=threads,
        )  # fmt: skip
        _refuse(report, allow_partial)
    return report, integer


#: What `zsq quantize` says too, which has no such option.
_ALL_THE_SAME = "`zsq export RUN --allow-partial` (allow_partial=True) writes it all the same"


def _refuse(report: ExportReport, allow_partial: bool) -> None:
    """Raise where a file is not what was asked for; the file is then not kept."""
    if allow_partial:
        return
    if report.fused < report.convs or report.fused_matmuls < report.matmuls:
        raise RunError(_partial(report))
    differing = round(report.images * (1 - report.agreement / 100))
    if differing > max(1, report.images * (1 - LEAST_AGREEMENT / 100)):
        raise RunError(
            f"the file names another class than its simulation for {differing} of {report.images} "
            f"images; at least {LEAST_AGREEMENT} % should agree. {_ALL_THE_SAME}; report the network, please."
        )


def _partial(report: ExportReport) -> str:
    names = "; ".join(report.unfused[:5]) or "their names are lost in the runtime's graph"
    more = f"; and {len(report.unfused) - 5} more" if len(report.unfused) > 5 else ""
    left = report.convs - report.fused + report.matmuls - report.fused_matmuls
    return (
        f"{left} of {report.convs + report.matmuls} layers would run in float: {names}{more}. "
        f"{_ALL_THE_SAME}, slower."
    )
