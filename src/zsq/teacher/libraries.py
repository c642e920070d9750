# SPDX-License-Identifier: Apache-2.0
"""Networks by name out of pytorchcv, torchvision, timm and our own zoo."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from zsq.errors import UsageError
from zsq.teacher.checkpoints import describe


@dataclass(frozen=True)
class Metadata:
    """What a source knows about the images its network was trained on; None: unknown.

    Attributes:
        input_shape: channels, height, width.
        mean: of each channel, pixels in [0, 1].
        std: of each channel, pixels in [0, 1].
        resize: pixels of the short side before the centre crop when evaluating.
        interpolation: of that resize, by Pillow's name.
    """

    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    interpolation: str = "bilinear"


def build_pytorchcv(name: str, *, pretrained: bool) -> tuple[nn.Module, Metadata]:
    """Build ``name`` with pytorchcv. It knows the input size, not the normalisation."""
    provider = _import("pytorchcv.model_provider", "pip install pytorchcv==0.0.67")
    name = name.lower()  # as it does itself
    _require_known(name, getattr(provider, "_models", {}), "pytorchcv")
    try:
        module = provider.get_model(name, pretrained=pretrained)
    except Exception as error:  # network errors of any kind, missing weights, bad hashes
        raise _cannot_build(f"pytorchcv:{name}", pretrained, error) from error
    size = getattr(module, "in_size", None)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        return module, Metadata()
    return module, Metadata(input_shape=(_input_channels(module), int(size[0]), int(size[1])))


def build_torchvision(name: str, *, pretrained: bool) -> tuple[nn.Module, Metadata]:
    """Build ``name`` with torchvision. Metadata is that of its default weights."""
    models = _import("torchvision.models", "pip install torchvision")
    name = name.lower()  # as it does itself
    _require_known(name, models.list_models(), "torchvision")
    try:
        module = models.get_model(name, weights="DEFAULT" if pretrained else None)
        preset = models.get_model_weights(name).DEFAULT.transforms()
    except Exception as error:
        raise _cannot_build(f"torchvision:{name}", pretrained, error) from error
    # Presets of other tasks than classification have none of these.
    crop, resize = (getattr(preset, key, None) for key in ("crop_size", "resize_size"))
    if not crop or not resize:
        return module, Metadata()
    interpolation = getattr(getattr(preset, "interpolation", None), "value", "bilinear")
    return module, Metadata(
        input_shape=(3, int(crop[0]), int(crop[-1])),
        mean=tuple(map(float, preset.mean)),
        std=tuple(map(float, preset.std)),
        resize=int(resize[0]),
        interpolation=str(interpolation),
    )


def build_timm(name: str, *, pretrained: bool) -> tuple[nn.Module, Metadata]:
    """Build ``name`` with timm; ``name`` may carry a tag (``resnet18.a1_in1k``) or ``hf-hub:``."""
    timm = _import("timm", "pip install timm")
    if ":" not in name:
        _require_known(name.partition(".")[0], timm.list_models(), "timm")
    try:
        module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        raise _cannot_build(f"timm:{name}", pretrained, error) from error
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return module, Metadata()
    channels, height, width = (int(side) for side in config["input_size"])
    return module, Metadata(
        input_shape=(channels, height, width),
        mean=_floats(config.get("mean")),
        std=_floats(config.get("std")),
        # timm's own evaluation resizes the short side so that the crop is this part of it
        resize=math.floor(min(height, width) / config["crop_pct"])
        if config.get("crop_pct")
        else None,
        interpolation=config.get("interpolation") or "bilinear",
    )


def build_zoo(name: str, *, pretrained: bool) -> tuple[nn.Module, Metadata]:
    """Build a network of our own zoo."""
    from zsq.zoo import ZOO, build  # the zoo reads its weights with our checkpoints module

    _require_known(name, ZOO, "zsq")
    entry = ZOO[name]
    module = build(name, pretrained=pretrained)
    return module, Metadata(input_shape=entry.input_shape, mean=entry.mean, std=entry.std)


LIBRARIES = {
    "pytorchcv": build_pytorchcv,
    "torchvision": build_torchvision,
    "timm": build_timm,
    "zsq": build_zoo,
}


def _import(module: str, install: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise UsageError(f"{package} is not installed: {install}") from error
        raise UsageError(
            f"{package} is installed but cannot be imported ({describe(error)}): {install}"
        ) from error
    except Exception as error:  # torchvision raises RuntimeError beside another build of torch
        raise UsageError(
            f"{package} is installed but cannot be imported ({describe(error)}): install the "
            "build that belongs to your PyTorch."
        ) from error


def _require_known(name: str, known: Iterable[str], library: str) -> None:
    known = list(known)
    if not known or name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "look its name up in that library."
    if library == "zsq":
        hint = f"there are {', '.join(known)}."
    raise UsageError(f"{library} has no network {name!r}: {hint}")


def _cannot_build(reference: str, pretrained: bool, error: Exception) -> UsageError:
    if not pretrained:
        return UsageError(f"{reference} cannot be built ({describe(error)}).")
    return UsageError(
        f"the weights of {reference} cannot be obtained ({describe(error)}): check the network "
        "connection, pass a checkpoint with --weights FILE, or --weights random to look at the "
        "architecture alone."
    )


def _input_channels(module: nn.Module) -> int:
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)


def _floats(values: Iterable[float] | None) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if values else None
