# SPDX-License-Identifier: Apache-2.0
"""Judging a run, a model or an ONNX file on a folder of real images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from zsq.artifact.networkfile import load_saved_teacher, load_student
from zsq.artifact.runfolder import RunFolder
from zsq.errors import RunError, UsageError
from zsq.evaluation.folder import open_for
from zsq.evaluation.metrics import Evaluation, evaluate_networks
from zsq.export.simulate import IntegerSimulation
from zsq.runtime.ambient import own_modes
from zsq.runtime.policy import channels_last, make_policy, on_device
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.teacher.teacher import ModelInfo, load_teacher

Network = Callable[[Tensor], Tensor]

#: Images on which a file is compared with its exact simulation, which takes as long as the rest.
SIMULATED = 1000


@own_modes()
def evaluate(
    subject: str | Path,
    data: str | Path,
    *,
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resize: int | None = None,
    batch: int = 200,
    simulated: int = SIMULATED,
    device: str = "cpu",
    weights: str | None = None,
    allow_pickle: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure top-1 and top-5 on an ImageFolder.

    Args:
        subject: a run folder (teacher, student, and ONNX file where there is one, all on the same
            images; the result is kept with the run), an ONNX file, or a MODEL string.
        data: folder of class folders of images; class index = position in sorted order, so there is
            one for each of the network's classes, empty or not.
        input_shape: (C, H, W), where the subject does not know it.
        mean: normalisation mean per channel, likewise.
        std: normalisation standard deviation, likewise.
        resize: resize the short side to this before the centre crop.
        batch: images per pass.
        simulated: images on which a run's ONNX file is compared with the exact integer simulation,
            which costs as much as everything else; 0 for none.
        device: for networks that run in torch.
        weights: checkpoint for a MODEL string.
        allow_pickle: read checkpoints that run code when read.
        reporter: progress.

    Returns:
        ``{"teacher": {"top1", "top5", "stderr", "top5_stderr", "images"}, "student": ..., "onnx": ...,
        "agreement": per cent of images on which teacher and student agree, "agreement_stderr": in points,
        "divergence": {"nats", "stderr", "images"} of the student from the teacher, ...}``.

    Raises:
        UsageError: unreadable subject or data, unknown normalisation or device, other classes than
            the network's, or an option that has no effect on the subject.
    """
    place = make_policy(device).device
    given = {"input_shape": input_shape, "mean": mean, "std": std}
    path = Path(subject)
    _check_used(path, device, input_shape=input_shape, weights=weights, allow_pickle=allow_pickle)
    if path.is_dir():
        networks, info = _of_run(path, device, simulated > 0)
    elif path.suffix == ".onnx":
        networks, info = _of_file(path, given)
    elif not path.exists() and ":" not in str(subject):
        raise UsageError(
            f"{subject} does not exist; give the folder of a run, an ONNX file, or a MODEL like pytorchcv:NAME."
        )
    else:
        teacher = load_teacher(
            str(subject),
            weights=weights,
            allow_pickle=allow_pickle,
            input_shape=input_shape,
            mean=mean,
            std=std,
        )
        networks, info = {"teacher": _on_device(teacher.network, device)}, teacher.info
    folder = open_for(
        replace(
            info, mean=mean or info.mean, std=std or info.std,
            resize=info.resize if resize is None else resize,
        ), data,
    )  # fmt: skip
    reporter = reporter or QuietReporter()
    with reporter.task("evaluation", len(folder)) as task, torch.no_grad(), on_device(place):
        evaluation = evaluate_networks(
            networks, folder.batches(batch), classes=len(folder.classes),
            first={"simulation": simulated}, progress=_advancer(task),
        )  # fmt: skip
    result = _result(evaluation, subject, data)
    if path.is_dir():
        run = RunFolder.open(path)
        run.record["results"]["evaluation"] = result
        try:
            run.save()
        except RunError as error:  # what was measured is not lost with it
            reporter.note(f"the result is not kept in the run: {error}")
    return result


def _check_used(path: Path, device: str, **options: object) -> None:
    """Refuse options that would have no effect: what they ask for would silently not be done.

    Raises:
        UsageError: names the first.
    """
    if path.is_dir():
        unused = {name: value for name, value in options.items() if value}
        why = "a run, which brings its own network and input shape"
    elif path.suffix == ".onnx":
        unused = {name: options[name] for name in ("weights", "allow_pickle") if options[name]}
        unused |= {} if device == "cpu" else {"device": device}
        why = "an ONNX file, which brings its own weights and runs on the CPU"
    else:
        return
    for name in unused:
        raise UsageError(
            f"--{name.replace('_', '-')} has no effect on {path}, {why}; leave it out."
        )


def _advancer(task: Any) -> Callable[[int], None]:
    """Adapt "n images done so far" to "n more"."""
    seen = 0

    def advance(done: int) -> None:
        nonlocal seen
        task.advance(done - seen)
        seen = done

    return advance


def _on_device(network: torch.nn.Module, device: str) -> Network:
    placed = channels_last(network.to(device)).eval()  # a tenth to a third faster on CPUs
    return lambda x: placed(x.to(device).contiguous(memory_format=torch.channels_last)).cpu()


def _of_run(path: Path, device: str, simulate: bool) -> tuple[dict[str, Network], ModelInfo]:
    folder = RunFolder.open(path)
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    student = load_student(folder.require("student.safetensors"))
    networks = {
        "teacher": _on_device(teacher.network, device),
        "student": _on_device(student, device),
    }
    file, integers = folder.file("model.onnx"), folder.file("integer.safetensors")
    if file.exists() != integers.exists():
        there, gone = (file, integers) if file.exists() else (integers, file)
        raise UsageError(
            f"{path} has {there.name} but no {gone.name}; run `zsq export {path}` to make both again."
        )
    if file.exists():
        networks["onnx"] = open_onnx(file)
        if simulate:
            networks["simulation"] = IntegerSimulation(load_student(integers))
    return networks, teacher.info


def _of_file(path: Path, given: dict[str, Any]) -> tuple[dict[str, Network], ModelInfo]:
    session = _session(path)
    declared = _declared_input(session, path)
    properties = dict(session.get_modelmeta().custom_metadata_map)
    known = {k: _numbers(properties.get(f"zsq.{k}", "")) for k in ("input_shape", "mean", "std")}
    chosen = {k: given[k] or known[k] for k in known}
    if not chosen["input_shape"]:
        chosen["input_shape"] = (
            declared if all(isinstance(side, int) for side in declared) else None
        )
    if not chosen["input_shape"]:
        raise UsageError(f"{path} does not say its input shape; pass --input-shape C,H,W.")
    shape = tuple(int(side) for side in chosen["input_shape"])
    fits = [
        isinstance(wanted, str | None) or wanted == side
        for wanted, side in zip(declared, shape, strict=False)
    ]
    if len(shape) != 3 or not all(fits):
        free = any(not isinstance(side, int) for side in declared)
        raise UsageError(
            f"{path} takes images of {' x '.join(map(str, declared))}, not of {' x '.join(map(str, shape))}; "
            + ("give --input-shape C,H,W of that kind." if free else "leave --input-shape out.")
        )
    resize = _numbers(properties.get("zsq.resize", ""))
    info = ModelInfo(
        str(path), shape, chosen["mean"], chosen["std"], resize=int(resize[0]) if resize else None,
        interpolation=properties.get("zsq.interpolation", "bilinear"),
    )  # fmt: skip
    return {"onnx": _runner(session)}, info


def _declared_input(session: Any, path: Path) -> tuple[int | str | None, ...]:
    """Return what a file says of one image's shape: sizes, or names where any size will do.

    Raises:
        UsageError: it takes something else than a batch of images.
    """
    inputs = session.get_inputs()
    one = inputs[0]
    if len(inputs) != 1 or one.type != "tensor(float)" or len(one.shape) != 4:
        taken = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise UsageError(
            f"{path} takes {taken}; only files that take one batch of images can be evaluated, float32 (N, C, H, W)."
        )
    return tuple(one.shape[1:])


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        found = tuple(float(part) for part in text.strip("()[] ").split(",") if part.strip())
    except ValueError:
        return None
    return found if found and all(map(math.isfinite, found)) else None


def _session(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give an ONNX file.")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UsageError(f"{path} cannot be opened by ONNX Runtime: {str(error)[:200]}") from error


def _runner(session: Any) -> Network:
    """Return a session as a function of a batch; a file of a fixed batch is given as many images at a time."""
    given = session.get_inputs()[0]
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None

    def part(x: Tensor) -> Tensor:
        missing = fixed - len(x) if fixed else 0
        whole = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
        try:
            logits = session.run(None, {given.name: whole.cpu().numpy()})[0]
        except Exception as error:  # ONNX Runtime has a dozen types of its own
            raise UsageError(f"ONNX Runtime cannot run the file: {str(error)[:200]}") from error
        return torch.from_numpy(logits)[: len(x)]

    return lambda x: torch.cat([part(each) for each in torch.split(x, fixed or len(x))])


def open_onnx(path: Path) -> Network:
    """Return an ONNX file as a function of a tensor.

    Raises:
        UsageError: missing or unreadable.
    """
    return _runner(_session(path))


def _result(evaluation: Evaluation, subject: str | Path, data: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = {"subject": str(subject), "data": os.path.realpath(data)}
    for name, score in evaluation.scores.items():
        result[name] = score.to_dict()
    names = set(evaluation.scores)
    if {"teacher", "student"} <= names:
        result["agreement"] = evaluation.agreement("teacher", "student")
        result["agreement_stderr"] = evaluation.agreement_stderr("teacher", "student")
        result["drop"] = evaluation.difference("teacher", "student").to_dict()
        result["divergence"] = evaluation.divergence("student").to_dict()
    if {"onnx", "simulation"} <= names:
        result["onnx"]["agreement"] = evaluation.agreement("onnx", "simulation")
        result["onnx"]["agreement_stderr"] = evaluation.agreement_stderr("onnx", "simulation")
    if {"student", "onnx"} <= names:
        result["onnx"]["drop"] = evaluation.difference("student", "onnx").to_dict()
        result["onnx"]["divergence"] = evaluation.divergence("onnx").to_dict()
    return result
