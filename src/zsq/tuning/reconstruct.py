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
from torch.nn import functional

from zsq.config import Tuning
from zsq.errors import RunError
from zsq.functional.masks import RandomMasks
from zsq.functional.rounding import beta_at, rounding_regularizer
from zsq.functional.schedules import cosine
from zsq.quantizers.attach import calibrate
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.weight import SoftRoundWeight
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.student import Student, calibrate_student, prepared_network
from zsq.synthesis.images import ImageSet
from zsq.teacher.pieces import cut_piece, nodes_up_to
from zsq.teacher.teacher import Teacher
from zsq.tuning.pieces import Piece, block_pieces, layer_modules, layer_pieces, quantizer_modules

#: Images per pass when boundaries are computed.
PASS = 64
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
    if settings.steps:
        if settings.unit == "layer":
            _layers_one_by_one(network, student, images.images, context)
        else:
            _blocks_in_a_row(network, student, images.images, context)
    calibrate_student(student, images.images.to(policy.device))
    return student.freeze()


def _blocks_in_a_row(
    network: GraphModule, student: Student, images: Tensor, context: Context
) -> None:
    pieces = block_pieces(network, student)
    from_teacher = from_student = images
    for index, piece in enumerate(pieces):
        target = run(piece.teacher, from_teacher, context)
        _tune_or_restore(
            index, len(pieces), piece, Problem(from_teacher, from_student, target), student, context
        )
        if index < len(pieces) - 1:
            from_student = run(piece.student, from_student, context)
        from_teacher = target


def _layers_one_by_one(
    network: GraphModule, student: Student, images: Tensor, context: Context
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
        _tune_or_restore(
            index, len(pieces), piece, Problem(inputs[0], inputs[1], target), student, context
        )


@torch.no_grad()
def run(piece: GraphModule, inputs: Tensor, context: Context) -> Tensor:
    """Run a piece over many inputs, a few at a time; the result lies on the CPU or where inputs lie."""
    device = context.policy.device
    return torch.cat(
        [piece(part.to(device)).to(inputs.device) for part in torch.split(inputs, PASS)]
    )


@dataclass(frozen=True)
class Problem:
    """Data of one reconstruction: the piece's input from both networks and the teacher's output."""

    from_teacher: Tensor
    from_student: Tensor
    target: Tensor


def _tune_or_restore(
    index: int, count: int, piece: Piece, problem: Problem, student: Student, context: Context
) -> None:
    name = f"piece_{index:03d}"
    saved = context.checkpoints.load(name)
    settings = student.recipe.tuning
    if saved is None:
        with (
            seeded(context.seed, "tuning", index),
            context.reporter.task(
                f"reconstruction {index + 1} of {count}, {piece.name}", settings.steps
            ) as task,
        ):
            tuner = PieceTuner(piece, problem, settings, context)
            tuner.calibrate()
            for step in range(settings.steps):
                loss = tuner.step(step)
                if step % RECORD_EVERY == 0 or step == settings.steps - 1:
                    _record(context, loss, step, index, piece)
                task.advance(1, loss=loss)
            undecided = tuner.finish()
        context.record("tuning", settings.steps, piece=piece.name, undecided=undecided)
        context.checkpoints.save(name, _state(piece))
        context.flush()
    else:
        _restore(piece, saved)


def _record(context: Context, loss: Tensor, step: int, index: int, piece: Piece) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise RunError(
            f"the reconstruction loss of {piece.name} became {value} at step {step}. Lower tuning.rounding_lr "
            "or tuning.scale_lr with --set, and check the images for outliers."
        )
    context.record("tuning", step, loss=value, piece=piece.name, index=index)


class PieceTuner:
    """The optimisation of one piece, step by step.

    Args:
        piece: its student part is tuned in place.
        problem: inputs and target, (N, ...) each.
        settings: of the recipe.
        context: says where to compute.
    """

    def __init__(self, piece: Piece, problem: Problem, settings: Tuning, context: Context) -> None:
        self.piece, self.settings, self.context = piece, settings, context
        self.problem = _channels_last(problem, context.policy.device)
        self.layers = layer_modules(piece)
        self.quantizers = quantizer_modules(piece)
        self.weights = [
            w
            for w in (layer.weight for layer in self.layers.values())
            if isinstance(w, SoftRoundWeight)
        ]
        self.order = torch.empty(0, dtype=torch.long)
        self.masks = RandomMasks(settings.mix)
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.settings
        groups = []
        if settings.learn_weight_scale and self.weights:
            groups.append({"params": [w.raw_scale for w in self.weights], "lr": settings.scale_lr})
        if settings.learn_activation_scale and self.quantizers:
            steps = [q.raw_scale for q in self.quantizers.values()]
            groups.append({"params": steps, "lr": settings.activation_lr})
        self.base_rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self.step_optimizer = torch.optim.Adam(groups, fused=True) if groups else None
        rounding = [w.rounding for w in self.weights]
        optimizers: list[torch.optim.Optimizer] = (
            [self.step_optimizer] if self.step_optimizer else []
        )
        if rounding:
            optimizers.append(torch.optim.Adam(rounding, lr=settings.rounding_lr, fused=True))
        trained = [p for group in groups for p in group["params"]] + rounding  # type: ignore[attr-defined]
        for parameter in self.piece.student.parameters():
            parameter.requires_grad_(any(parameter is p for p in trained))
        return optimizers

    def calibrate(self) -> None:
        """Give the piece's activation quantizers a first step, then switch them on."""
        for quantizer in self.quantizers.values():
            quantizer.enabled = False
        inputs = self.problem.from_student[: self.settings.calibration_images]
        calibrate(
            self.piece.student, self.quantizers, list(torch.split(inputs, PASS)),
            power=self.settings.power, asymmetric=self.settings.asymmetric,
        )  # fmt: skip
        for quantizer in self.quantizers.values():
            quantizer.enabled = True
            quantizer.drop = self.settings.drop

    def next_indices(self) -> Tensor:
        """Return the next batch of image indices: a fresh permutation each epoch, nothing dropped."""
        count = len(self.problem.target)
        batch = min(self.settings.batch, count)
        if len(self.order) < batch:
            fresh = torch.randperm(count, device=self.problem.target.device)
            self.order = torch.cat([self.order.to(fresh.device), fresh])
        indices, self.order = self.order[:batch], self.order[batch:]
        return indices

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Return the reconstruction error: squared, summed over channels, averaged over the rest."""
        total = functional.mse_loss(self.piece.student(inputs), target, reduction="sum")
        return total * (target.shape[1] / target.numel())

    def regularizer(self, step: int) -> Tensor | None:
        """Return lambda times the rounding regulariser of the last forward pass.

        None during the warm-up.
        """
        settings = self.settings
        if (
            step < settings.warmup * settings.steps
            or not self.weights
            or settings.rounding_weight == 0
        ):
            return None
        beta = beta_at(
            step,
            settings.steps,
            start=settings.beta_start,
            end=settings.beta_end,
            warmup=settings.warmup,
        )
        terms = [rounding_regularizer(w.used_bits, beta) for w in self.weights]
        return settings.rounding_weight * torch.stack(terms).sum()

    def step(self, step: int) -> Tensor:
        """Make one step; return the reconstruction error of its batch, detached."""
        indices = self.next_indices()
        problem = self.problem
        inputs = problem.from_teacher[indices]
        if self.settings.mix > 0:
            student_side = self.masks.draw(inputs)
            inputs = torch.lerp(inputs, problem.from_student[indices], student_side)
        loss = self.loss(inputs, problem.target[indices])
        regularizer = self.regularizer(step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss if regularizer is None else loss + regularizer).backward()  # type: ignore[no-untyped-call]
        if self.step_optimizer is not None:
            factor = cosine(step, self.settings.steps)
            for group, rate in zip(self.step_optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def finish(self) -> float:
        """Round hard and stop dropping; return the share of bits that were still undecided."""
        total = sum(w.rounding.numel() for w in self.weights)
        open_bits = sum(w.undecided() * w.rounding.numel() for w in self.weights)
        for layer in self.layers.values():
            layer.freeze()
        for quantizer in self.quantizers.values():
            quantizer.drop = 0.0
        self.piece.student.requires_grad_(False)
        return open_bits / total if total else 0.0


def _channels_last(problem: Problem, device: torch.device) -> Problem:
    def convert(x: Tensor) -> Tensor:
        x = x.to(device)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    return Problem(
        convert(problem.from_teacher), convert(problem.from_student), convert(problem.target)
    )


def _state(piece: Piece) -> dict[str, Tensor]:
    """Everything that tuning decided about a piece."""
    state: dict[str, Tensor] = {}
    for path, layer in layer_modules(piece).items():
        frozen = layer.frozen
        state[f"{path}.codes"] = frozen.integers
        state[f"{path}.scale"] = frozen.scale
        state[f"{path}.zero_point"] = frozen.zero_point
    for name, quantizer in quantizer_modules(piece).items():
        state[f"quantizers.{name}.raw_scale"] = quantizer.raw_scale
        state[f"quantizers.{name}.zero_point"] = quantizer.zero_point
    return state


@torch.no_grad()
def _restore(piece: Piece, state: dict[str, Tensor]) -> None:
    for path, layer in layer_modules(piece).items():
        _restore_layer(layer, {k: state[f"{path}.{k}"] for k in ("codes", "scale", "zero_point")})
    for name, quantizer in quantizer_modules(piece).items():
        quantizer.raw_scale.copy_(state[f"quantizers.{name}.raw_scale"])
        quantizer.zero_point.copy_(state[f"quantizers.{name}.zero_point"])
        quantizer.calibrated.fill_(True)
        quantizer.enabled = True


def _restore_layer(layer: QuantizedLayer, saved: dict[str, Tensor]) -> None:
    layer.freeze()
    frozen = layer.frozen
    frozen.integers.copy_(saved["codes"])
    frozen.scale.copy_(saved["scale"])
    frozen.zero_point.copy_(saved["zero_point"])
