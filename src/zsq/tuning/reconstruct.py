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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.config import Reconstruction
from zsq.errors import RunError
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.runtime.shelf import Shelf, describe, host_budget
from zsq.student import Student, calibrate_student, prepared_network
from zsq.synthesis.images import ImageSet
from zsq.teacher.inspect import node_shapes
from zsq.teacher.pieces import cut_piece, nodes_up_to
from zsq.teacher.teacher import Teacher
from zsq.tuning.compiling import PieceCompiler
from zsq.tuning.importance import channel_importance
from zsq.tuning.piece_state import piece_state, restore_piece
from zsq.tuning.pieces import Piece, block_pieces, layer_pieces, tuned_pieces
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
    importance = _importance(network, student, images.images, context)
    tools = _Tools(context, compiler, _shelf(context), importance)
    for each in _passes(settings):
        if each.settings.unit == "layer":
            _layers_one_by_one(network, student, images.images, each, tools)
        else:
            _blocks_in_a_row(network, student, images.images, each, tools)
    calibrate_student(student, images.images.to(policy.device))
    return student.freeze()


@dataclass(frozen=True)
class _Pass:
    """One sweep over the network: what its records are of, its settings, whether activations are quantized in it."""

    name: str
    stage: str
    settings: Reconstruction
    activations: bool


@dataclass(frozen=True)
class _Tools:
    """What all pieces of a run share; channels' importance is by the node that holds them."""

    context: Context
    compiler: PieceCompiler
    shelf: Shelf
    importance: dict[str, Tensor]


def _shelf(context: Context) -> Shelf:
    return Shelf(host_budget(context.policy), context.checkpoints.folder)


def _importance(
    network: GraphModule, student: Student, images: Tensor, context: Context
) -> dict[str, Tensor]:
    """Return what channels count, by the pieces' output nodes; nothing where all count the same.

    The logits do: there the error is already that of the predictions.
    """
    settings = student.recipe.tuning
    assert isinstance(settings, Reconstruction)
    if settings.importance == "uniform" or not settings.steps:
        return {}
    if settings.unit == "block":
        pieces = tuned_pieces(block_pieces(network, student))
    else:
        pieces = layer_pieces(network, student.network)
    place = {node.name: i for i, node in enumerate(network.graph.nodes)}
    names = sorted((piece.output for piece in pieces), key=lambda name: place[name])[:-1]
    return channel_importance(network, names, images[: settings.calibration_images], context)


def _passes(settings: Reconstruction) -> list[_Pass]:
    """Return the sweeps of a method: one for weights and activations together, or one for each."""
    if settings.quantize_activations == "together":
        return [_Pass("piece", "tuning", settings, True)] if settings.steps else []
    passes = [_Pass("piece", "tuning", settings, False)] if settings.steps else []
    if settings.activation_steps:
        # as published: the float network's inputs, and a power that large errors weigh more in
        second = {"steps": settings.activation_steps, "mix": 0.0, "drop": 0.0, "loss_power": 2.4}
        passes.append(
            _Pass("activations", "tuning of activations", settings.model_copy(update=second), True)
        )
    return passes


def _blocks_in_a_row(
    network: GraphModule, student: Student, images: Tensor, sweep: _Pass, tools: _Tools
) -> None:
    pieces, context, shelf = block_pieces(network, student), tools.context, tools.shelf
    context.reporter.note(describe(shelf, *_boundaries(pieces, images, context)))
    index, count = 0, len(tuned_pieces(pieces))
    from_teacher = from_student = images
    for piece in pieces:
        if piece.parts:
            context.reporter.note(
                f"{piece.name}: {len(piece.layers)} layers without a cut between them are reconstructed "
                f"in {len(piece.parts)} parts"
            )
            # the parts' tensors are alive beside the piece's inputs
            half = replace(tools, shelf=replace(shelf, budget=shelf.budget // 2))
            _one_by_one(
                piece.parts, (piece.teacher, piece.student), (from_teacher, from_student),
                index, count, sweep, half,
            )  # fmt: skip
        target = run(piece.teacher, from_teacher, context, shelf)
        if not piece.parts:
            counts = tools.importance.get(piece.output)
            problem = Problem(from_teacher, from_student, target, counts)
            _tune_or_restore(index, count, piece, problem, sweep, tools)
            del problem
        index += len(piece.parts) or 1
        # nothing holds the old one, so that three tensors are alive, not four
        from_teacher = target
        if index < count:
            from_student = run(piece.student, from_student, context, shelf)


def _layers_one_by_one(
    network: GraphModule, student: Student, images: Tensor, sweep: _Pass, tools: _Tools
) -> None:
    pieces = layer_pieces(network, student.network)
    image = images[:1].to(tools.context.policy.device)
    most = _most_at_once(network, pieces, image, len(images))
    tools.context.reporter.note(describe(tools.shelf, [], most))
    networks = (network, student.network)
    _one_by_one(pieces, networks, (images, images), 0, len(pieces), sweep, tools)


def _one_by_one(
    pieces: Sequence[Piece], networks: tuple[GraphModule, GraphModule],
    inputs: tuple[Tensor, Tensor], first: int, count: int, sweep: _Pass, tools: _Tools,
) -> None:  # fmt: skip
    """Tune pieces that were cut out of two graphs, each on what the graphs compute for it by then.

    Args:
        pieces: each reads only what those before compute.
        networks: the teacher's and the student's graph.
        inputs: of the graphs, (N, ...) each.
        first: index of the first of them among all that are tuned.
        count: of all that are tuned.
        sweep: how.
        tools: of the run.
    """
    for index, piece in enumerate(pieces, first):
        from_teacher, from_student = (
            values(network, given, piece.source, tools.context, tools.shelf)
            for network, given in zip(networks, inputs, strict=True)
        )
        target = run(piece.teacher, from_teacher, tools.context, tools.shelf)
        counts = tools.importance.get(piece.output)
        problem = Problem(from_teacher, from_student, target, counts)
        _tune_or_restore(index, count, piece, problem, sweep, tools)
        # or they would be alive beside the next piece's
        del from_teacher, from_student, target, problem


def values(
    network: GraphModule, inputs: Tensor, name: str, context: Context, shelf: Shelf | None = None
) -> Tensor:
    """Return what a node of a graph computes from many inputs."""
    if name in {n.name for n in network.graph.nodes if n.op == "placeholder"}:
        return inputs
    part = cut_piece(network, nodes_up_to(network, name), name)
    return run(part, inputs, context, shelf)


def _boundaries(
    pieces: list[Piece], images: Tensor, context: Context
) -> tuple[list[tuple[int, ...]], int]:
    """Return the shape of what each piece puts out for all images, and the most bytes that one in parts takes."""
    value, shapes, most = images[:1].to(context.policy.device), [], 0
    with torch.no_grad():
        for piece in pieces:
            if piece.parts:
                inside = _most_at_once(piece.teacher, piece.parts, value, len(images))
                most = max(most, 2 * len(images) * value.nbytes + inside)
            value = piece.teacher(value)
            shapes.append((len(images), *value.shape[1:]))
    return shapes, most


def _most_at_once(network: GraphModule, pieces: Sequence[Piece], image: Tensor, count: int) -> int:
    """Return the bytes of two inputs and the target of the largest of some pieces, for so many images.

    Args:
        network: that the pieces were cut out of.
        pieces: of which one at a time is tuned.
        image: what the network reads of one image, (1, ...), where it is computed.
        count: of all images.
    """
    shapes = node_shapes(network, image)
    sizes = {name: 4 * count * shape.numel() for name, shape in shapes.items()}
    return max(2 * sizes[piece.source] + sizes[piece.output] for piece in pieces)


@torch.no_grad()
def run(piece: GraphModule, inputs: Tensor, context: Context, shelf: Shelf | None = None) -> Tensor:
    """Run a piece over many inputs, a few at a time; the result lies on a shelf, on the CPU."""
    device, done = context.policy.device, 0
    result: Tensor | None = None
    for part in torch.split(inputs, PASS):
        outputs = piece(part.to(device))
        if result is None:
            result = (shelf or Shelf()).room((len(inputs), *outputs.shape[1:]))
        result[done : done + len(part)].copy_(outputs)
        done += len(part)
    assert result is not None
    return result


def _tune_or_restore(
    index: int, count: int, piece: Piece, problem: Problem, sweep: _Pass, tools: _Tools
) -> None:
    context = tools.context
    name = f"{sweep.name}_{index:03d}"
    saved = context.checkpoints.load(name)
    if saved is not None:
        restore_piece(piece, saved)
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
            compiler=tools.compiler,
        )
        tuner.calibrate()
        context.group.align(piece.student)
        for step in range(steps if tuner.optimizers else 0):
            loss = tuner.step(step)
            if step % RECORD_EVERY == 0 or step == steps - 1:
                _record(context, sweep.stage, loss, step, index, piece)
            task.advance(1, loss=loss)
        undecided = tuner.finish()
        context.group.align(piece.student)
    context.record(sweep.stage, steps, piece=piece.name, undecided=undecided)
    context.checkpoints.save(name, piece_state(piece, activations=sweep.activations))
    context.flush()


def _record(
    context: Context, stage: str, loss: Tensor, step: int, index: int, piece: Piece
) -> None:
    value = float(context.group.mean({"loss": loss}, 1 / context.group.size)["loss"])
    if not math.isfinite(value):
        raise RunError(
            f"the reconstruction loss of {piece.name} became {value} at or before step {step}. Lower "
            "tuning.rounding_lr or tuning.scale_lr with --set, and check the images for outliers."
        )
    context.record(stage, step, loss=value, piece=piece.name, index=index)
