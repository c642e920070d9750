# SPDX-License-Identifier: Apache-2.0
"""GENIE-M: reconstruct a network piece by piece (arXiv 2212.04780, section 4.2).

Each piece learns to give the teacher's output from the student's input: soft bits that decide how
every weight is rounded (AdaRound), the weight steps jointly with them (GENIE-M), the activation
steps (LSQ), with half of the activations left unquantized at random (QDrop). AdaRound, BRECQ and
QDrop are settings of this loop.

Boundaries are propagated, not recomputed: only the tensors at the current cut are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.config import Reconstruction
from zsq.errors import RunError
from zsq.quantizers.layers import QuantizedLayer
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.student import Student, calibrate_student, prepared_network
from zsq.synthesis.images import ImageSet
from zsq.teacher.pieces import cut_piece, nodes_up_to
from zsq.teacher.teacher import Teacher
from zsq.tuning.compiling import PieceCompiler
from zsq.tuning.pieces import Piece, block_pieces, layer_modules, layer_pieces, quantizer_modules
from zsq.tuning.tuner import PASS, PieceTuner, Problem

#: Steps between two records of the loss, and between two looks for NaN.
RECORD_EVERY = 100


def reconstruct(teacher: Teacher, student: Student, images: ImageSet, context: Context) -> Student:
    """Tune a student piece by piece until it gives the teacher's outputs.

    Args:
        teacher: stays as it is.
        student: from `zsq.student.attach`; tuned in place.
        images: synthetic or real.
        context: finished pieces are taken from, and kept in, its checkpoints.

    Returns:
        The student, frozen on integers.

    Raises:
        UsageError: the images do not suit the network.
        RunError: a loss became NaN.
    """
    images.check(student.info.input_shape)
    policy = context.policy
    network = policy.place(prepared_network(teacher, student.recipe))
    policy.place(student.network)
    settings = student.recipe.tuning
    assert isinstance(settings, Reconstruction)
    compiler = PieceCompiler(policy, context.reporter.note)
    for each in _passes(settings):
        if each.settings.unit == "layer":
            _layers_one_by_one(network, student, images.images, each, context, compiler)
        else:
            _blocks_in_a_row(network, student, images.images, each, context, compiler)
    calibrate_student(student, images.images.to(policy.device))
    return student.freeze()


@dataclass(frozen=True)
class _Pass:
    """One sweep over the network: its settings, and whether activations are quantized in it."""

    name: str
    settings: Reconstruction
    activations: bool


def _passes(settings: Reconstruction) -> list[_Pass]:
    """Return the sweeps of a method: one for weights and activations together, or one for each."""
    if settings.quantize_activations == "together":
        return [_Pass("piece", settings, True)] if settings.steps else []
    passes = [_Pass("piece", settings, False)] if settings.steps else []
    if settings.activation_steps:
        # as published: the float network's inputs, and a power that large errors weigh more in
        second = {"steps": settings.activation_steps, "mix": 0.0, "drop": 0.0, "loss_power": 2.4}
        passes.append(_Pass("activations", settings.model_copy(update=second), True))
    return passes


def _blocks_in_a_row(
    network: GraphModule,
    student: Student,
    images: Tensor,
    sweep: _Pass,
    context: Context,
    compiler: PieceCompiler,
) -> None:
    pieces = block_pieces(network, student)
    from_teacher = from_student = images
    for index, piece in enumerate(pieces):
        target = run(piece.teacher, from_teacher, context)
        problem = Problem(from_teacher, from_student, target)
        _tune_or_restore(index, len(pieces), piece, problem, sweep, context, compiler)
        if index < len(pieces) - 1:
            from_student = run(piece.student, from_student, context)
        from_teacher = target


def _layers_one_by_one(
    network: GraphModule,
    student: Student,
    images: Tensor,
    sweep: _Pass,
    context: Context,
    compiler: PieceCompiler,
) -> None:
    pieces = layer_pieces(network, student)
    for index, piece in enumerate(pieces):
        inputs = [images, images]
        if piece.source not in {n.name for n in network.graph.nodes if n.op == "placeholder"}:
            parts = [
                cut_piece(each, nodes_up_to(each, piece.source), piece.source)
                for each in (network, student.network)
            ]
            inputs = [run(part, images, context) for part in parts]
        target = run(piece.teacher, inputs[0], context)
        problem = Problem(inputs[0], inputs[1], target)
        _tune_or_restore(index, len(pieces), piece, problem, sweep, context, compiler)


@torch.no_grad()
def run(piece: GraphModule, inputs: Tensor, context: Context) -> Tensor:
    """Run a piece over many inputs, a few at a time; the result lies on the CPU or where inputs lie."""
    device = context.policy.device
    return torch.cat(
        [piece(part.to(device)).to(inputs.device) for part in torch.split(inputs, PASS)]
    )


def _tune_or_restore(
    index: int,
    count: int,
    piece: Piece,
    problem: Problem,
    sweep: _Pass,
    context: Context,
    compiler: PieceCompiler,
) -> None:
    name = f"{sweep.name}_{index:03d}"
    saved = context.checkpoints.load(name)
    if saved is not None:
        _restore(piece, saved)
        return
    title = f"reconstruction {index + 1} of {count}, {piece.name}"
    steps = sweep.settings.steps
    with (
        seeded(context.seed, "tuning", sweep.name, index, *context.group.stream),
        context.reporter.task(title, steps) as task,
    ):
        tuner = PieceTuner(
            piece,
            problem,
            sweep.settings,
            context,
            activations=sweep.activations,
            compiler=compiler,
        )
        tuner.calibrate()
        context.group.align(piece.student)
        for step in range(steps if tuner.optimizers else 0):
            loss = tuner.step(step)
            if step % RECORD_EVERY == 0 or step == steps - 1:
                _record(context, loss, step, index, piece)
            task.advance(1, loss=loss)
        undecided = tuner.finish()
        context.group.align(piece.student)
    context.record("tuning", steps, piece=piece.name, undecided=undecided)
    context.checkpoints.save(name, _state(piece, sweep.activations))
    context.flush()


def _record(context: Context, loss: Tensor, step: int, index: int, piece: Piece) -> None:
    value = float(context.group.mean({"loss": loss}, 1 / context.group.size)["loss"])
    if not math.isfinite(value):
        raise RunError(
            f"the reconstruction loss of {piece.name} became {value} at step {step}. Lower tuning.rounding_lr "
            "or tuning.scale_lr with --set, and check the images for outliers."
        )
    context.record("tuning", step, loss=value, piece=piece.name, index=index)


def _state(piece: Piece, activations: bool) -> dict[str, Tensor]:
    """Everything that tuning decided about a piece."""
    state: dict[str, Tensor] = {}
    for path, layer in layer_modules(piece).items():
        frozen = layer.frozen
        state[f"{path}.codes"] = frozen.integers
        state[f"{path}.scale"] = frozen.scale
        state[f"{path}.zero_point"] = frozen.zero_point
        if layer.bias is not None:
            state[f"{path}.bias"] = layer.bias.detach()
    for name, quantizer in quantizer_modules(piece).items() if activations else ():
        state[f"quantizers.{name}.raw_scale"] = quantizer.raw_scale
        state[f"quantizers.{name}.zero_point"] = quantizer.zero_point
    return state


@torch.no_grad()
def _restore(piece: Piece, state: dict[str, Tensor]) -> None:
    for path, layer in layer_modules(piece).items():
        saved = {k: state[f"{path}.{k}"] for k in ("codes", "scale", "zero_point")}
        _restore_layer(layer, saved, state.get(f"{path}.bias"))
    for name, quantizer in quantizer_modules(piece).items():
        if f"quantizers.{name}.raw_scale" not in state:
            continue  # a pass over the weights alone
        quantizer.raw_scale.copy_(state[f"quantizers.{name}.raw_scale"])
        quantizer.zero_point.copy_(state[f"quantizers.{name}.zero_point"])
        quantizer.calibrated.fill_(True)
        quantizer.enabled = True


def _restore_layer(layer: QuantizedLayer, saved: dict[str, Tensor], bias: Tensor | None) -> None:
    layer.freeze()
    frozen = layer.frozen
    frozen.integers.copy_(saved["codes"])
    frozen.scale.copy_(saved["scale"])
    frozen.zero_point.copy_(saved["zero_point"])
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
