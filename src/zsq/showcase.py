# SPDX-License-Identifier: Apache-2.0
"""The demo: the main job, end to end, on something that needs no download."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from zsq.artifact.runfolder import RunFolder
from zsq.demo import save_digits, train_digits, write_image_folder
from zsq.errors import UsageError
from zsq.judge import evaluate
from zsq.pipeline import quantize
from zsq.runtime.progress import Reporter


def run_demo(out: str | None, reporter: Reporter) -> dict[str, Any]:
    """Train on scikit-learn's digits, quantize at W4A4 without them, evaluate and deploy.

    Args:
        out: folder to keep everything in; a temporary one by default.
        reporter: progress.

    Returns:
        Rows of the closing table.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; choose another folder with -o.")
        folder.mkdir(parents=True, exist_ok=True)
        return _run(folder, reporter)
    with tempfile.TemporaryDirectory(prefix="zsq-demo-") as name:
        return _run(Path(name), reporter)


def _run(folder: Path, reporter: Reporter) -> dict[str, Any]:
    with reporter.task("training a small network on real digits", 100) as task:
        seen = 0

        def progress(done: int, total: int, loss: float) -> None:
            nonlocal seen
            reached = 100 * done // total
            task.advance(reached - seen, loss=loss)
            seen = reached

        module, images, labels = train_digits(0, progress)
    save_digits(module, folder / "digits.safetensors")
    write_image_folder(images, labels, folder / "held_out")
    run = folder / "run"
    quantize(
        "zsq:digits", "genie", bits="w4a4", schedule="quick", weights=str(folder / "digits.safetensors"),
        out=run, reporter=reporter,
    )  # fmt: skip
    scores = evaluate(run, folder / "held_out", reporter=reporter)
    export = RunFolder.open(run).record["results"]["export"]
    student_bytes = (run / "student.safetensors").stat().st_size
    rows = [
        ("FP32", scores["teacher"]["top1"], export["float_bytes"], export["float_latency_ms"]),
        ("W4A4, simulated", scores["student"]["top1"], student_bytes, None),
        ("W4A4, ONNX Runtime", scores["onnx"]["top1"], export["bytes"], export["latency_ms"]),
    ]
    return {
        "title": "a network trained on digits, quantized without them",
        "rows": [dict(zip(("name", "top1", "bytes", "milliseconds"), row, strict=True)) for row in rows],
        "export": export, "evaluation": scores,
        "closing": f"{export['fused']} of {export['convs']} convolutions run as integers; ONNX Runtime and the "
        f"simulation agree on {scores['onnx']['agreement']:.2f} % of the held-out images.",
    }  # fmt: skip
