# SPDX-License-Identifier: Apache-2.0
"""Learned equalization: the factors of a network's channels, from what quantized activations cost.

Cross-layer equalization (Nagel et al., arXiv 1906.04721, section 4.1) gives a stream's channels alike
ranges by a formula. What a channel's steps are worth to the predictions the formula cannot know. So the
factors are learned from there, by their logarithm and jointly with the activations' steps (LSQ, arXiv
1902.08153): all activations are quantized, weights are not, and the divergence from the float network is
what falls. A factor per channel is a step per channel that costs nothing when the network runs, as
the layers around it take it over. The method is this package's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.functional.affine import Grid
from zsq.functional.losses import kl_divergence
from zsq.functional.schedules import cosine
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import calibrate, copy_network, insert_quantizers
from zsq.quantizers.protocol import Placement
from zsq.runtime.context import Context
from zsq.runtime.fetching import Fetcher
from zsq.runtime.seeds import seeded
from zsq.runtime.terms import record_terms
from zsq.settings.tuning import Calibration
from zsq.teacher.equalize import find_streams

#: Images per step, rate of the logarithms under Adam (with a cosine to 0), temperature of the predictions.
BATCH, RATE, TEMPERATURE = 64, 1e-2, 4.0
#: Pixels that go through the network at a time: a step's images in slices, so that it fits in memory.
PIXELS = 1 << 18
#: Steps between two records, and so between two looks for NaN.
RECORD_EVERY = 50
ADVICE = "Check the images for outliers, or leave the step out with --set tuning.equalize_steps=0."


@dataclass(frozen=True)
class Equalization:
    """What was learned about a network.

    Attributes:
        factors: what to multiply channels by, (C,), positive, by the name of the first tensor of their
            stream; those of streams of which nothing is quantized are left out.
        grids: of the quantized activations of the network so rescaled, by the tensors' names.
    """

    factors: dict[str, Tensor]
    grids: dict[str, Grid]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as named tensors."""
        tensors = {f"factors.{name}": factor for name, factor in self.factors.items()}
        for name, grid in self.grids.items():
            tensors |= {f"scale.{name}": grid.scale, f"zero_point.{name}": grid.zero_point}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Equalization:
        """Read what `to_tensors` wrote."""

        def named(kind: str) -> dict[str, Tensor]:
            return {k.split(".", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{kind}.")}

        scales, zero_points = named("scale"), named("zero_point")
        return cls(
            named("factors"),
            {n: Grid(s, zero_points[n], torch.full_like(s, torch.nan)) for n, s in scales.items()},
        )


class RescaledQuantizer(nn.Module):
    """An activation quantizer on channels that a factor each was taken out of.

    Args:
        quantizer: of the tensor as it would then be.
        logarithms: of the factors, (C,); shared by the tensors of a stream.
        axis: of the tensor that the channels are on.
    """

    def __init__(
        self, quantizer: ActivationQuantizer, logarithms: nn.Parameter, axis: int = 1
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.logarithms = logarithms
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with steps that differ between channels by their factors."""
        shape = [1] * x.ndim
        shape[self.axis] = -1
        factor = self.logarithms.exp().view(shape)
        return self.quantizer(x.float() / factor) * factor  # type: ignore[no-any-return]


def learn_equalization(
    network: GraphModule, placement: Placement, images: Tensor, steps: int, settings: Calibration,
    context: Context,
) -> Equalization:  # fmt: skip
    """Learn what to multiply a network's channels by before its activations are quantized, and their steps.

    All processes of a group learn the same.

    Args:
        network: float; stays as it is.
        placement: which activations are quantized, to how many bits.
        images: (N, C, H, W), normalised.
        steps: how many.
        settings: how first steps are chosen.
        context: what was learned before is taken from, and kept in, its checkpoints.

    Raises:
        RunError: the loss became NaN.
    """
    saved = context.checkpoints.load("equalization")
    if saved is not None:
        return Equalization.from_tensors(saved)
    student = _with_quantizers(network, placement, images, settings, context)
    quantizers = {name: _quantizer(student, name) for name in placement.activations}
    logarithms = _share_logarithms(student, network)
    if quantizers:
        with seeded(context.seed, "equalization"):
            _learn(student, images, _predictions(network, images, context), steps, context)
    found = Equalization(
        {name: (-learned.detach()).exp().cpu() for name, learned in logarithms.items()},
        {name: quantizer.cpu().grid() for name, quantizer in quantizers.items()},
    )
    context.checkpoints.save("equalization", found.to_tensors())
    context.flush()
    return found


def _with_quantizers(
    network: GraphModule, placement: Placement, images: Tensor, settings: Calibration, context: Context
) -> GraphModule:  # fmt: skip
    """Return a copy of the network with calibrated activation quantizers, and float weights."""
    student = copy_network(network).requires_grad_(False)
    insert_quantizers(student, placement, ActivationQuantizer)
    context.policy.place(student)
    quantizers = {name: _quantizer(student, name) for name in placement.activations}
    for quantizer in quantizers.values():
        quantizer.enabled = False
    sample = images[: settings.calibration_images].to(context.policy.device)
    calibrate(
        student, quantizers, list(torch.split(sample, BATCH)), power=settings.power,
        asymmetric=settings.asymmetric,
    )  # fmt: skip
    for quantizer in quantizers.values():
        quantizer.enabled = True
    return student.eval()


def _quantizer(student: GraphModule, name: str) -> ActivationQuantizer:
    module = student.get_submodule(f"quantizers.{name}")
    assert isinstance(module, ActivationQuantizer)
    return module


def _share_logarithms(student: GraphModule, network: GraphModule) -> dict[str, nn.Parameter]:
    """Put factors of 1 on the student's quantizers, the same on the tensors of a stream."""
    found = {}
    holders = student.quantizers
    assert isinstance(holders, nn.Module)
    for stream in find_streams(network):
        carriers = (*stream.writers, *stream.tensors)  # protocol `integer` quantizes both
        axes = {n.name: stream.axes[n] for n in carriers if n.name in holders._modules}
        if not axes:
            continue
        device = _quantizer(student, next(iter(axes))).raw_scale.device
        logarithms = nn.Parameter(torch.zeros(stream.channels(network), device=device))
        found[stream.tensors[0].name] = logarithms
        for name, axis in axes.items():
            holders.add_module(name, RescaledQuantizer(_quantizer(student, name), logarithms, axis))
    return found


@torch.no_grad()
def _predictions(network: GraphModule, images: Tensor, context: Context) -> Tensor:
    """Return the float network's logits of all images, (N, classes), on the CPU."""
    placed = context.policy.placed_copy(network)
    found = []
    for part in _slices(images):
        there = part.to(context.policy.device).contiguous(memory_format=torch.channels_last)
        with context.policy.autocast():
            found.append(placed(there).float().cpu())
    return torch.cat(found)


def _slices(images: Tensor) -> tuple[Tensor, ...]:
    return torch.split(images, max(1, PIXELS // math.prod(images.shape[2:])))


def _learn(
    student: GraphModule, images: Tensor, wanted: Tensor, steps: int, context: Context
) -> None:
    device = context.policy.device
    pictures, targets = Fetcher(images, BATCH, device), Fetcher(wanted, BATCH, device)
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=RATE)
    with context.reporter.task("equalization", steps) as task:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * cosine(step, steps)
            optimizer.zero_grad()
            chosen = torch.randperm(len(images))[:BATCH]
            loss = _backward(student, pictures.fetch(chosen), targets.fetch(chosen), context)
            optimizer.step()
            if step % RECORD_EVERY == 0 or step == steps - 1:
                record_terms(context, "equalization", step, {"loss": loss}, advice=ADVICE)
            task.advance(1, loss=loss)


def _backward(student: GraphModule, batch: Tensor, wanted: Tensor, context: Context) -> Tensor:
    """Add up the gradients of a batch, a slice at a time; return its mean divergence."""
    parts = _slices(batch)
    targets = torch.split(wanted, len(parts[0]))
    total = torch.zeros((), device=batch.device)
    for part, target in zip(parts, targets, strict=True):
        with context.policy.autocast():
            given = student(part.contiguous(memory_format=torch.channels_last))
        loss = kl_divergence(given, target, TEMPERATURE, "sample")
        loss = loss * (len(part) / len(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total
