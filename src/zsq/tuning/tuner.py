# SPDX-License-Identifier: Apache-2.0
"""The optimisation of one piece of a network: soft bits, steps, and what is left unquantized."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq.config import Reconstruction
from zsq.functional.losses import reconstruction_error
from zsq.functional.masks import RandomMasks
from zsq.functional.rounding import beta_at, rounding_regularizer
from zsq.functional.schedules import cosine
from zsq.quantizers.attach import calibrate
from zsq.quantizers.weight import SoftRoundWeight
from zsq.runtime.context import Context
from zsq.runtime.fetching import Fetcher
from zsq.runtime.policy import Policy
from zsq.runtime.shelf import free_memory
from zsq.tuning.compiling import Loss, PieceCompiler
from zsq.tuning.pieces import Piece, layer_modules, quantizer_modules

#: Images per pass when boundaries are computed.
PASS = 64
#: Share of a GPU's free memory that a piece's inputs and targets may take; else they stay outside.
FREE_SHARE = 0.5
#: Weights of more bits are tuned in float32: bf16 errs by half a code of 8 bits, by 1/8 of 6.
BITS_BELOW_BF16 = 6


@dataclass(frozen=True)
class Problem:
    """Data of one reconstruction: the piece's input from both networks and the teacher's output.

    Attributes:
        from_teacher, from_student: (N, ...) inputs.
        target: (N, C, ...).
        importance: what an error of each channel counts, (C,); None: all the same.
    """

    from_teacher: Tensor
    from_student: Tensor
    target: Tensor
    importance: Tensor | None = None


class PieceTuner:
    """The optimisation of one piece, step by step.

    Args:
        piece: its student part is tuned in place.
        problem: inputs and target, (N, ...) each.
        settings: of the recipe.
        context: says where to compute.
        activations: quantize the piece's activations too; False leaves its quantizers alone.
        compiler: shared by the pieces of a sweep; None computes every step as it is written.
    """

    def __init__(
        self, piece: Piece, problem: Problem, settings: Reconstruction, context: Context, *,
        activations: bool = True, compiler: PieceCompiler | None = None,
    ) -> None:  # fmt: skip
        self.piece, self.settings, self.context = piece, settings, context
        self.problem = _placed(problem, context.policy.device)
        self.layers = layer_modules(piece)
        self.quantizers = quantizer_modules(piece) if activations else {}
        self.weights = [
            w
            for w in (layer.weight for layer in self.layers.values())
            if isinstance(w, SoftRoundWeight)
        ]
        self.policy = piece_policy(piece, context.policy)
        self.order = torch.empty(0, dtype=torch.long)
        self.masks = RandomMasks(settings.mix)
        self.batch = min(settings.batch, len(problem.target))
        context.group.check_batch(self.batch, "tuning.batch")
        self.from_teacher, self.from_student, self.target = (
            Fetcher(tensor, self.batch, context.policy.device)
            for tensor in (
                self.problem.from_teacher,
                self.problem.from_student,
                self.problem.target,
            )
        )
        self.pulling = tuple(torch.zeros((), device=context.policy.device) for _ in range(2))
        self.optimizers = self._optimizers()
        worth = compiler is not None and compiler.worth(settings.steps, self.batch, problem.target)
        self.compiler = compiler if worth else None
        self.compiled: Loss | None = None

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.settings
        groups = []
        if settings.learn_weight_scale and self.weights:
            groups.append({"params": [w.raw_scale for w in self.weights], "lr": settings.scale_lr})
        if settings.learn_activation_scale and self.quantizers:
            steps = [q.raw_scale for q in self.quantizers.values()]
            groups.append({"params": steps, "lr": settings.activation_lr})
        biases = [b for layer in self.layers.values() if (b := layer.bias) is not None]
        if settings.bias_lr > 0 and biases:
            groups.append({"params": biases, "lr": settings.bias_lr})
        self.base_rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self.step_optimizer = torch.optim.Adam(groups, fused=True) if groups else None
        rounding = [w.rounding for w in self.weights]
        optimizers: list[torch.optim.Optimizer] = (
            [self.step_optimizer] if self.step_optimizer else []
        )
        if rounding:
            rate = settings.rounding_lr or min(20 / settings.steps, 0.1)
            optimizers.append(torch.optim.Adam(rounding, lr=rate, fused=True))
        self.trained = [p for group in groups for p in group["params"]] + rounding  # type: ignore[attr-defined]
        for parameter in self.piece.student.parameters():
            parameter.requires_grad_(any(parameter is p for p in self.trained))
        return optimizers

    def calibrate(self) -> None:
        """Give the piece's activation quantizers a first step where they have none; switch them all on."""
        for quantizer in self.quantizers.values():
            quantizer.enabled = False
        without = {n: q for n, q in self.quantizers.items() if not bool(q.calibrated)}
        device = self.context.policy.device
        inputs = self.problem.from_student[: self.settings.calibration_images].to(device)
        calibrate(
            self.piece.student, without, list(torch.split(inputs, PASS)),
            power=self.settings.power, asymmetric=self.settings.asymmetric,
        )  # fmt: skip
        for quantizer in self.quantizers.values():
            quantizer.enabled = True
            quantizer.drop = self.settings.drop

    def next_indices(self) -> Tensor:
        """Return the next batch of image indices, on the CPU: a fresh permutation each epoch, nothing dropped.

        The processes of a group share it: process 0 draws the order, each takes its slice.
        """
        count, batch, group = len(self.problem.target), self.batch, self.context.group
        if len(self.order) < batch:
            fresh = group.first_says(torch.randperm(count))
            self.order = torch.cat([self.order, fresh])
        indices, self.order = self.order[:batch], self.order[batch:]
        return group.part(indices)

    def _read_ahead(self) -> None:
        """Have the next batch read from files, where it lies there and its images are drawn already."""
        if len(self.order) < self.batch:
            return
        indices = self.context.group.part(self.order[: self.batch])
        mixed = [self.from_student] if self.settings.mix > 0 else []
        for fetcher in (self.from_teacher, self.target, *mixed):
            fetcher.read_ahead(indices)

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Return the reconstruction error: a power, summed over channels, averaged over the rest."""
        with self.policy.autocast():
            outputs = self.piece.student(inputs)
        return reconstruction_error(
            outputs.float(), target, self.settings.loss_power, self.problem.importance
        )

    def pull(self, step: int) -> tuple[float, float]:
        """Return the regulariser's exponent and weight; it has none during the warm-up."""
        settings = self.settings
        beta = beta_at(
            step, settings.steps, start=settings.beta_start, end=settings.beta_end,
            warmup=settings.warmup,
        )  # fmt: skip
        warming_up = step < settings.warmup * settings.steps
        return beta, 0.0 if warming_up or not self.weights else settings.rounding_weight

    def regularizer(self, step: int) -> Tensor | None:
        """Return lambda times the rounding regulariser of the last forward pass, None where it is 0."""
        beta, weight = self.pull(step)
        if weight == 0:
            return None
        terms = [rounding_regularizer(w.used_bits, beta) for w in self.weights]
        return weight * torch.stack(terms).sum()

    def losses(self, step: int, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is minimised in a step, and the reconstruction error in it."""
        if self.compiler is None:
            error, regularizer = self.loss(inputs, target), self.regularizer(step)
            return error if regularizer is None else error + regularizer, error
        if self.compiled is None:
            self.compiled = self.compiler.loss(
                self.piece, self.quantizers.values(), inputs, power=self.settings.loss_power,
                policy=self.policy,
            )  # fmt: skip
        for held, value in zip(self.pulling, self.pull(step), strict=True):
            held.fill_(value)  # a new tensor's values would be waited for
        beta, weight = self.pulling
        return self.compiled(inputs, target, beta, weight, self.problem.importance)

    def step(self, step: int) -> Tensor:
        """Make one step; return the reconstruction error of its batch, detached."""
        indices = self.next_indices()
        inputs = self.from_teacher.fetch(indices)
        if self.settings.mix > 0:
            theirs = self.from_student.fetch(indices)
            inputs = torch.lerp(inputs, theirs, self.masks.draw(inputs))
        target = self.target.fetch(indices)
        self._read_ahead()
        total, error = self.losses(step, inputs, target)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.optimizers:
            total.backward()  # type: ignore[no-untyped-call]
        # the regulariser is the same on all processes, and their shares sum to 1: it counts once
        self.context.group.sum_gradients(self.trained, len(indices) / self.batch)
        if self.step_optimizer is not None:
            factor = cosine(step, self.settings.steps)
            for group, rate in zip(self.step_optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor
        for optimizer in self.optimizers:
            optimizer.step()
        return error.detach()

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


def piece_policy(piece: Piece, policy: Policy) -> Policy:
    """Return how a piece is computed: in bf16 only where that is much finer than a code."""
    if all(layer.bits <= BITS_BELOW_BF16 for layer in layer_modules(piece).values()):
        return policy
    return dataclasses.replace(policy, dtype=torch.float32)


def _placed(problem: Problem, device: torch.device) -> Problem:
    """Put a problem where its batches are drawn: on the device where it fits, else where it lies."""
    tensors = [problem.from_teacher, problem.from_student, problem.target]
    fits = True
    if device.type == "cuda":
        fits = sum(t.nbytes for t in tensors) <= FREE_SHARE * free_memory(device)
    ours, theirs, target = (_channels_last(t.to(device) if fits else t) for t in tensors)
    importance = None if problem.importance is None else problem.importance.to(device)
    return Problem(ours, theirs, target, importance)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
