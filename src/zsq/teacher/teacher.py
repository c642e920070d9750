# SPDX-License-Identifier: Apache-2.0
"""The teacher: the user's trained network, frozen, as a graph, with what is known of its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.errors import UsageError
from zsq.runtime.ambient import own_modes
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.sources import Source, check_finite, load_source

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model besides its graph.

    Attributes:
        reference: what the user typed, e.g. ``pytorchcv:resnet20_cifar10``.
        input_shape: shape of one image, (C, H, W).
        mean: normalisation mean per channel, in [0, 1] pixel units; None when unknown.
        std: normalisation standard deviation per channel; None when unknown.
        resize: short side to resize to before the centre crop when reading images; None: no resize.
        interpolation: of that resize, by Pillow's name.
    """

    reference: str
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Teacher:
    """A frozen network and what is known of its input. Nothing in zsq ever changes it."""

    network: GraphModule
    info: ModelInfo

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of ``x``, (N, C, H, W) -> (N, classes)."""
        return self.network(x)  # type: ignore[no-any-return]


@own_modes()
def load_teacher(
    model: str | nn.Module | torch.export.ExportedProgram,
    *,
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resize: int | None = None,
    weights: str | None = None,
    allow_pickle: bool = False,
) -> Teacher:
    """Load a trained network as a teacher.

    Args:
        model: a MODEL string (see `zsq.teacher.sources.load_source`), a module, or an exported
            program.
        input_shape: shape of one image, (C, H, W), where the source does not know it.
        mean: normalisation mean per channel, where the source does not know it.
        std: normalisation standard deviation per channel, likewise.
        resize: short side to resize pictures of a folder to before the centre crop, likewise.
        weights: a checkpoint to load into the model, or ``"random"``.
        allow_pickle: read checkpoints that run code when read. Only for files you trust.

    Returns:
        The teacher, on the CPU.

    Raises:
        UsageError: the model cannot be loaded or read, or its input shape is unknown.
    """
    source = load_source(model, weights=weights, allow_pickle=allow_pickle)
    info = _info(source, input_shape, mean, std, resize)
    module = source.module
    if isinstance(module, nn.Module):
        check_finite(module)
        program = export_module(module, info.input_shape)
    else:
        program = module
    network = build_network(program)
    check_finite(network)
    _check_runs(network, info)
    return Teacher(network, info)


def _as_numbers(
    values: Iterable[Any] | None, kind: Callable[[Any], Number]
) -> tuple[Number, ...] | None:
    """Return what a caller gave for a shape or a normalisation as plain numbers."""
    try:
        return None if values is None else tuple(kind(value) for value in values)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a shape or normalisation of {values!r} is none ({error}); give numbers, e.g. (3, 224, 224)."
        ) from error


def _info(
    source: Source, input_shape: tuple[int, ...] | None, mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None, resize: int | None,
) -> ModelInfo:  # fmt: skip
    input_shape = _as_numbers(input_shape, int)
    mean, std = _as_numbers(mean, float), _as_numbers(std, float)
    shape = tuple(input_shape or source.input_shape or ())
    if not shape:
        shape = _placeholder_shape(source.module)
    if len(shape) != 3 or any(side < 1 for side in shape):
        raise UsageError(
            f"the input shape of {source.reference} is {shape or 'unknown'}; pass the shape of one "
            "image as channels, height, width, e.g. --input-shape 3,224,224."
        )
    mean, std = mean or source.mean, std or source.std
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != shape[0]:
            raise UsageError(
                f"--{name} has {len(values)} values but the input has {shape[0]} channels; give "
                "one value each."
            )
        if values is not None and not all(map(math.isfinite, values)):
            raise UsageError(f"--{name} {values} must be finite: one number a channel.")
    if std is not None and min(std) <= 0:
        raise UsageError(f"--std {std} must be positive.")
    if resize is not None and resize < max(shape[1:]):
        raise UsageError(
            f"--resize {resize} is smaller than the network's images of {shape[1]} x {shape[2]}; give at least "
            f"{max(shape[1:])}."
        )
    if resize is None:
        resize = source.resize
    return ModelInfo(source.reference, shape, mean, std, resize, source.interpolation)


def shape_of(example_inputs: object) -> tuple[int, ...]:
    """Return the shape of one image of a batch.

    Raises:
        UsageError: it is no batch of images.

    Example:
        >>> shape_of(torch.zeros(2, 3, 8, 8))
        (3, 8, 8)
    """
    if not isinstance(example_inputs, Tensor) or example_inputs.ndim != 4:
        shape = getattr(example_inputs, "shape", None)
        raise UsageError(
            f"example_inputs is a {type(example_inputs).__name__}"
            f"{'' if shape is None else f' of shape {tuple(shape)}'}; give a batch of images as a "
            "tensor (N, C, H, W), or input_shape=(C, H, W)."
        )
    return tuple(example_inputs.shape[1:])


def _placeholder_shape(module: object) -> tuple[int, ...]:
    """Read the image shape off an exported program's input."""
    if not isinstance(module, torch.export.ExportedProgram):
        return ()
    names = set(module.graph_signature.user_inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            return tuple(int(side) for side in node.meta["val"].shape[1:])
    return ()


@torch.no_grad()
def _check_runs(network: GraphModule, info: ModelInfo) -> None:
    """Check that the network takes any batch size and returns finite (N, classes)."""
    try:
        output = network(torch.zeros(3, *info.input_shape))
    except Exception as error:
        raise UsageError(
            f"the network does not run on an input of shape (3, "
            f"{', '.join(map(str, info.input_shape))}): {str(error).splitlines()[0][:200]}. Check "
            "--input-shape; a .pt2 file must be exported with a dynamic batch size."
        ) from error
    if output.ndim != 2 or output.shape[0] != 3:
        raise UsageError(
            f"the network returns shape {tuple(output.shape)} for 3 images; zsq needs logits of "
            "shape (3, classes). Wrap the model so that it returns class logits."
        )
    if output.shape[1] == 1:
        raise UsageError(
            "the network returns one number an image; zsq compares answers as shares of classes, of which one is "
            "always all. Wrap the model so that it returns two logits, torch.cat([torch.zeros_like(z), z], 1) of "
            "its number z before any sigmoid: their softmax is that sigmoid."
        )
    if not bool(torch.isfinite(output).all()):
        raise UsageError(
            "the network returns NaN or Inf for an image of zeros, though its weights are finite; "
            "look for a negative running variance or a division by zero."
        )
