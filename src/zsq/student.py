# SPDX-License-Identifier: Apache-2.0
"""The student: the teacher's graph with quantizers on it, and what was decided about it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.config import Finetuning, RangeCalibration, Recipe, Reconstruction
from zsq.errors import UsageError
from zsq.functional.affine import search_weight_grid
from zsq.functional.ranges import RangeRule
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import calibrate, copy_network, insert_quantizers, quantize_layers
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.minmax import MinMaxWeight, TrackedActivation
from zsq.quantizers.protocol import Placement, place
from zsq.quantizers.weight import FrozenWeight, SoftRoundWeight, round_to_nearest
from zsq.runtime.ambient import own_modes
from zsq.settings import Tuning
from zsq.teacher.fold import fold_batch_norms
from zsq.teacher.layers import Layer
from zsq.teacher.teacher import ModelInfo, Teacher


class Student(nn.Module):
    """A quantized network.

    Attributes:
        network: the graph; layers are `QuantizedLayer`, edges carry `ActivationQuantizer`.
        placement: what is quantized to how many bits.
        info: what is known of the model.
        recipe: what the student was made with.
        finished: whether its weights are integers for good.
    """

    finished = False

    def __init__(
        self, network: GraphModule, placement: Placement, info: ModelInfo, recipe: Recipe
    ) -> None:
        super().__init__()
        self.network = network
        self.placement = placement
        self.info = info
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``x``, (N, C, H, W) -> (N, classes)."""
        return self.network(x)  # type: ignore[no-any-return]

    def layers(self) -> dict[str, QuantizedLayer]:
        """Return the quantized layers by module path, in execution order."""
        found = {path: self.network.get_submodule(path) for path in self.placement.weights}
        return {path: layer for path, layer in found.items() if isinstance(layer, QuantizedLayer)}

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Return the activation quantizers by the name of the node they quantize."""
        return {name: self.quantizer(name) for name in self.placement.activations}

    def quantizer(self, name: str) -> ActivationQuantizer:
        """Return the quantizer on the result of the node ``name``."""
        module = self.network.get_submodule(f"quantizers.{name}")
        assert isinstance(module, ActivationQuantizer)
        return module

    def freeze(self) -> Student:
        """Settle every weight on its integers and every quantizer on always quantizing."""
        for layer in self.layers().values():
            layer.freeze()
        for quantizer in self.quantizers().values():
            quantizer.settle()
        for parameter in self.parameters():
            parameter.grad = None  # an optimiser would take a step along it
        self.finished = True
        return self.requires_grad_(False).eval()

    def check_unfinished(self) -> None:
        """Refuse to tune integers.

        Raises:
            UsageError: the student was tuned before.
        """
        if self.finished:
            raise UsageError(
                "this student is finished: its weights are integers, which nothing tunes; `prepare` makes another."
            )

    def copy(self) -> Student:
        """Return an independent copy."""
        copied = Student(copy.deepcopy(self.network), self.placement, self.info, self.recipe)
        copied.finished = self.finished
        copied.training = self.training  # every part's was copied with it
        return copied


def prepared_network(teacher: Teacher, recipe: Recipe) -> GraphModule:
    """Return the float network that a recipe quantizes: batch norms folded or not."""
    if recipe.fold_batch_norm or recipe.protocol == "integer":
        return fold_batch_norms(teacher.network)
    return copy_network(teacher.network)


@own_modes()
def attach(teacher: Teacher, recipe: Recipe) -> Student:
    """Put a recipe's quantizers on a copy of the teacher, folded where the recipe says so.

    `zsq.prepare` equalizes channels before, as `zsq.quantize` does.

    For reconstruction weights start on their searched grid: learned rounding where there are steps,
    the nearest code where there are none. For fine-tuning they are master weights on a min-max grid
    that moves with them; for mere calibration they are rounded at once. Activation quantizers are
    off until tuning gives them a range.

    Args:
        teacher: stays as it is.
        recipe: names the protocol, bits and overrides.

    Returns:
        The student, on the teacher's device.

    Raises:
        UsageError: nothing to quantize, or an override that matches nothing.
    """
    network = prepared_network(teacher, recipe)
    placement = place(network, recipe.protocol, recipe.bits, recipe.overrides)
    quantize_layers(
        network,
        placement,
        lambda layer, bits: weight_quantizer(layer, bits, recipe.tuning),
    )
    insert_quantizers(network, placement, lambda bits: _activation_quantizer(bits, recipe.tuning))
    student = Student(network, placement, teacher.info, recipe)
    for quantizer in student.quantizers().values():
        quantizer.enabled = False
    device = next(iter(teacher.network.parameters())).device
    return student.to(device).eval()


def weight_quantizer(layer: Layer, bits: int, tuning: Tuning) -> nn.Module:
    """Return what a layer's weight goes through while it is tuned as the recipe says.

    Args:
        layer: of the teacher.
        bits: 2 to 8.
        tuning: of the recipe.
    """
    weight = layer.weight
    if isinstance(tuning, Finetuning):
        return MinMaxWeight(weight, bits)
    if isinstance(tuning, RangeCalibration) and tuning.weights == "minmax":
        return MinMaxWeight(weight, bits).freeze()
    # Depthwise layers of 8 bits are deployed on grids with zero in the middle (`zsq.export.deploy`); what
    # rounding learned on another would be rounded again.
    centred = layer.is_depthwise and bits == 8
    grid = search_weight_grid(weight, bits, power=tuning.power, centred=centred)
    if isinstance(tuning, RangeCalibration) or tuning.steps == 0:
        return round_to_nearest(weight, bits, grid)
    return SoftRoundWeight(weight, bits, grid, log_scale=tuning.log_scale)


def rounded_weight(layer: Layer, bits: int, tuning: Tuning) -> Tensor:
    """Return a layer's weight as it is before tuning: rounded to the grid that a recipe starts from."""
    quantizer = weight_quantizer(layer, bits, tuning)
    frozen = quantizer if isinstance(quantizer, FrozenWeight) else quantizer.freeze()  # type: ignore[operator]
    return frozen()  # type: ignore[no-any-return]


def _activation_quantizer(bits: int, tuning: Tuning) -> ActivationQuantizer:
    if isinstance(tuning, Finetuning):
        return TrackedActivation(
            bits, decay=tuning.range_decay, stop=tuning.clamped_gradient == "stop"
        )
    log_scale = isinstance(tuning, Reconstruction) and tuning.log_scale
    return ActivationQuantizer(bits, log_scale=log_scale)


@torch.no_grad()
def calibrate_student(
    student: Student, images: Tensor, *, batch: int = 128, rule: RangeRule = "error"
) -> None:
    """Give every activation quantizer that has none a step from ``images``, in one pass.

    Args:
        student: its uncalibrated quantizers are calibrated; all are switched on.
        images: (N, C, H, W), normalised.
        batch: images per pass.
        rule: how ranges are chosen.

    Raises:
        UsageError: ``images`` do not have the student's input shape.
    """
    if tuple(images.shape[1:]) != tuple(student.info.input_shape):
        raise UsageError(
            f"the images have shape {tuple(images.shape[1:])} but the network takes "
            f"{tuple(student.info.input_shape)}; use images made for this network."
        )
    tuning = student.recipe.tuning
    names = {n: q for n, q in student.quantizers().items() if not bool(q.calibrated)}
    batches = list(torch.split(images[: tuning.calibration_images], batch))
    calibrate(
        student.network, names, batches, power=tuning.power, asymmetric=tuning.asymmetric, rule=rule,
        percentile=tuning.percentile,
    )  # fmt: skip
    for quantizer in student.quantizers().values():
        quantizer.enabled = True
