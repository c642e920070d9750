# SPDX-License-Identifier: Apache-2.0
"""Does the exported file compute what the simulation says, in integers, and faster?

Everything here is measured by running the file in ONNX Runtime: nothing is inferred from the graph
that was written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from zsq.errors import RunError
from zsq.export.fusion import Fusion, read_fusion
from zsq.export.onnx import INPUT
from zsq.functional.losses import kl_divergence
from zsq.runtime.machine import usable_cores

_BATCH = 64
#: Timing stops after this many seconds, at least `_LEAST` runs of each file.
_SECONDS, _LEAST, _MOST = 4.0, 10, 100


@dataclass(frozen=True)
class ExportReport:
    """What an exported file was measured to be.

    Attributes:
        target: runtime and device the file is made for.
        agreement: images with the same top-1 class in file and simulation, in per cent.
        max_step_difference: largest difference of a logit, in steps of an 8-bit grid over the range
            of the simulation's logits: ``(max - min) / 255``.
        identical: share of logits that are the same float, in per cent.
        student_agreement: images with the same top-1 class in simulation and student, in per cent: what the
            8-bit edges cost that export adds where the student's protocol left them float.
        student_divergence: Kullback-Leibler divergence from student to simulation, in nats an image.
        images: number of images compared.
        fused: convolutions that run in integers.
        convs: convolutions in the file.
        fused_matmuls: matrix products that run in integers.
        matmuls: matrix products in the file.
        unfused: what was left in float and why, one sentence each.
        bytes: size of the file.
        float_bytes: size of the float file.
        ratio: ``float_bytes / bytes``.
        latency_ms: median time of one image.
        float_latency_ms: median time of one image in the float file.
        speedup: ``float_latency_ms / latency_ms``.
        threads: threads that both were timed with.
    """

    target: str
    agreement: float
    max_step_difference: float
    identical: float
    student_agreement: float
    student_divergence: float
    images: int
    fused: int
    convs: int
    fused_matmuls: int
    matmuls: int
    unfused: tuple[str, ...]
    bytes: int
    float_bytes: int
    ratio: float
    latency_ms: float
    float_latency_ms: float
    speedup: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {**asdict(self), "unfused": list(self.unfused)}


def measure(
    simulation: nn.Module, path: Path | str, float_path: Path | str, images: Tensor, *,
    student: nn.Module, target: str, threads: int | None = None,
) -> ExportReport:  # fmt: skip
    """Compare an exported file with the simulation and with the float file.

    Args:
        simulation: (N, C, H, W) -> logits; see `zsq.export.simulate.IntegerSimulation`.
        path: the integer file.
        float_path: the float file.
        images: (N, C, H, W), normalised.
        student: what the simulation was made of.
        target: written into the report.
        threads: of ONNX Runtime; None means one per usable core.

    Returns:
        The measurements.

    Raises:
        RunError: the runtime refuses one of the files, or fails on the way.
    """
    threads = threads or usable_cores()
    session = open_session(path, threads)
    ran = run_file(session, images)
    with torch.no_grad():
        simulated, before = (
            torch.cat([network(batch) for batch in torch.split(images, _BATCH)])
            for network in (simulation, student)
        )
    fusion = fusion_of(path)
    sizes = Path(path).stat().st_size, Path(float_path).stat().st_size
    latency, float_latency = latencies([session, open_session(float_path, threads)], images[:1])
    return ExportReport(
        target=target, **_agreement(ran, simulated), **_cost(before, simulated), images=len(images),
        fused=fusion.fused_convs, convs=fusion.convs,
        fused_matmuls=fusion.fused_matmuls, matmuls=fusion.matmuls, unfused=fusion.unfused,
        bytes=sizes[0], float_bytes=sizes[1], ratio=sizes[1] / sizes[0],
        latency_ms=latency, float_latency_ms=float_latency, speedup=float_latency / latency,
        threads=threads,
    )  # fmt: skip


def _agreement(ran: Tensor, simulated: Tensor) -> dict[str, float]:
    step = float(simulated.max() - simulated.min()) / 255
    difference = float((ran.double() - simulated.double()).abs().max())
    return {
        "agreement": 100 * float((ran.argmax(1) == simulated.argmax(1)).double().mean()),
        "max_step_difference": difference / step if step > 0 else 0.0,
        "identical": 100 * float((ran == simulated).double().mean()),
    }


def _cost(before: Tensor, after: Tensor) -> dict[str, float]:
    divergence = kl_divergence(after.double(), before, 1.0, "sample")
    return {
        "student_agreement": 100 * float((after.argmax(1) == before.argmax(1)).double().mean()),
        "student_divergence": float(divergence),
    }


def open_session(path: Path | str, threads: int, optimized: Path | None = None) -> Any:
    """Open a file in ONNX Runtime on the CPU.

    Args:
        path: the file.
        threads: intra-operator threads.
        optimized: where to save the graph that the runtime will execute.

    Raises:
        RunError: the runtime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        # one level below the default: the last one only renames what stayed float for its layout
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    with _refusals():
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what ONNX Runtime raises, types without a common base, into a `RunError`."""
    try:
        yield
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise RunError(
            f"ONNX Runtime {onnxruntime.__version__} does not run the exported file: {reason[:300]}. The "
            "quantized network itself is fine (zsq.load runs it); replace the operator named here to get "
            "an ONNX file."
        ) from error


def run_file(session: Any, images: Tensor) -> Tensor:
    """Return the logits that a file computes.

    Raises:
        RunError: the runtime fails on the way.
    """
    name = session.get_inputs()[0].name
    batches = torch.split(images.detach().cpu().float(), _BATCH)
    with _refusals():
        logits = [session.run(None, {name: batch.numpy()})[0] for batch in batches]
    return torch.cat([torch.from_numpy(batch) for batch in logits])


def fusion_of(path: Path | str) -> Fusion:
    """Let ONNX Runtime optimise a file and read what became of its layers."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, 1, optimized)
        return read_fusion(onnx.load(str(path)), onnx.load(str(optimized)))


def latencies(sessions: Sequence[Any], image: Tensor) -> list[float]:
    """Return the median milliseconds of each session on one image, runs interleaved.

    Interleaved, because whatever else the machine does then slows down all of them.
    """
    feed = {INPUT: image.detach().cpu().float().numpy()}
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        for _ in range(3):
            session.run(None, feed)
    begin = time.perf_counter()
    while len(times[0]) < _LEAST or (
        len(times[0]) < _MOST and time.perf_counter() - begin < _SECONDS
    ):
        for session, record in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            record.append(1000 * (time.perf_counter() - start))
    return [median(record) for record in times]
