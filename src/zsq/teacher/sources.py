# SPDX-License-Identifier: Apache-2.0
"""Where a network comes from: the MODEL that a user types, turned into a network and its facts."""

from __future__ import annotations

import contextlib
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from zsq.errors import UsageError
from zsq.teacher.archives import load_exported
from zsq.teacher.checkpoints import (
    ALLOW_PICKLE_MEANING,
    check_finite,
    describe,
    load_checkpoint,
    read_torch_file,
    require_file,
)
from zsq.teacher.libraries import LIBRARIES, Metadata
from zsq.teacher.scripts import build_from_file

__all__ = ["Source", "check_finite", "load_source"]

_FORMS = (
    "pytorchcv:NAME, torchvision:NAME, timm:NAME, zsq:NAME, path/to/file.py:function, or a .pt2 "
    "file of torch.export"
)


@dataclass(frozen=True)
class Source:
    """A network and what its origin says about the images it was trained on.

    Attributes:
        module: the network: in eval mode, float32, on the CPU; a copy where the user passed one.
        reference: what the user typed, or ``module:ClassName``.
        input_shape: channels, height, width of one image; None: the origin does not say.
        mean: of each channel, for pixels in [0, 1]; None: the origin does not say.
        std: of each channel, for pixels in [0, 1]; None: the origin does not say.
        resize: pixels of the short side before the centre crop when evaluating; None: no resize.
        interpolation: of that resize, by Pillow's name.
    """

    module: nn.Module | ExportedProgram
    reference: str
    input_shape: tuple[int, int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resize: int | None = None
    interpolation: str = "bilinear"


def load_source(
    model: str | nn.Module | ExportedProgram,
    *,
    weights: str | None = None,
    allow_pickle: bool = False,
) -> Source:
    """Turn what the user named into a network.

    Args:
        model: ``pytorchcv:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``zsq:NAME`` (our zoo),
            ``path/to/file.py:function`` (which is run), a ``.pt2`` file of ``torch.export.save``,
            a ``.pt`` or ``.pth`` file of ``torch.save(network)`` (only with ``allow_pickle``), or
            the network itself, which is copied.
        weights: a checkpoint to load instead of the library's weights, or ``"random"`` to build a
            named network without weights. The metadata stays that of the name.
        allow_pickle: read files that can run code while they are read.

    Returns:
        The source. Library names come with their metadata, the rest without.

    Raises:
        UsageError: anything that keeps this from giving a network with finite weights.

    Example:
        >>> source = load_source("zsq:resnet20_cifar10")
        >>> source.input_shape, source.mean
        ((3, 32, 32), (0.4914, 0.4822, 0.4465))
    """
    # Libraries print while they download, and standard output belongs to --json.
    with contextlib.redirect_stdout(sys.stderr):
        built, reference, metadata = _build(model, weights, allow_pickle)
        module: nn.Module | ExportedProgram
        if isinstance(built, ExportedProgram):
            module, metadata = _prepare_exported(built, reference, weights)
        else:
            module = _prepare(built, reference, copied=not isinstance(model, str))
            if weights is not None and weights != "random":
                load_checkpoint(module, weights, allow_pickle=allow_pickle)
    check_finite(module)
    return Source(
        module=module,
        reference=reference,
        input_shape=metadata.input_shape,
        mean=metadata.mean,
        std=metadata.std,
        resize=metadata.resize,
        interpolation=metadata.interpolation,
    )


def _build(
    model: str | nn.Module | ExportedProgram, weights: str | None, allow_pickle: bool
) -> tuple[nn.Module | ExportedProgram, str, Metadata]:
    """Return what was built, its reference and its metadata."""
    if isinstance(model, str):
        scheme, colon, name = model.partition(":")
        if colon and name and scheme in LIBRARIES:
            module, metadata = LIBRARIES[scheme](name, pretrained=weights is None)
            return module, model, metadata
    if weights == "random":
        raise UsageError(
            "weights 'random' is for networks built by name (timm:NAME and the like), which this "
            "is not: leave it out."
        )
    if isinstance(model, str):
        return _build_from_path(model, allow_pickle), model, Metadata()
    if isinstance(model, ExportedProgram):
        return model, "module:ExportedProgram", Metadata()
    if isinstance(model, nn.Module):
        return model, f"module:{type(_unwrap(model)).__name__}", Metadata()
    raise UsageError(
        f"model must be a string, a torch.nn.Module or an ExportedProgram, not a "
        f"{type(model).__name__}."
    )


def _build_from_path(model: str, allow_pickle: bool) -> nn.Module | ExportedProgram:
    path, colon, function = model.rpartition(":")
    if colon and path.endswith(".py"):
        return build_from_file(path, function)
    suffix = Path(model).suffix.lower()
    if suffix == ".py":
        raise UsageError(f"{model}: say which function builds the network, {model}:FUNCTION.")
    if suffix == ".pt2":
        return load_exported(model, allow_pickle=allow_pickle)
    if suffix in (".pt", ".pth"):
        return _load_pickled_module(model, allow_pickle)
    if suffix == ".safetensors":
        raise _weights_alone(model)
    raise UsageError(f"{model!r} names no network: MODEL is {_FORMS}.")


def _load_pickled_module(model: str, allow_pickle: bool) -> nn.Module:
    path = require_file(model)
    content = read_torch_file(path, allow_pickle=allow_pickle)
    if not allow_pickle or not isinstance(content, nn.Module):
        raise _weights_alone(model)
    return content


def _weights_alone(model: str) -> UsageError:
    return UsageError(
        f"{model} holds weights but no network: name the architecture and pass this file beside "
        f"it, as in 'timm:resnet18 --weights {model}' or 'file.py:function --weights {model}'. "
        f"(A whole network in one pickle: {ALLOW_PICKLE_MEANING}.)"
    )


def _computed(module: nn.Module) -> dict[int, object]:
    """Return what to copy computed tensors as, by their id.

    Pruning and the older weight norm keep a weight that a hook computes before each pass, with its
    history; such tensors refuse to be copied.
    """
    held = (value for part in module.modules() for value in vars(part).values())
    computed = [value for value in held if isinstance(value, Tensor) and value.grad_fn is not None]
    return {id(value): value.detach().clone() for value in computed}


def _prepare(module: nn.Module, reference: str, *, copied: bool) -> nn.Module:
    """Return the network in eval mode, float32, on the CPU; the user's own object is untouched."""
    module = _unwrap(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise UsageError(
                f"{reference}: {name} has no values yet (a lazy layer or the meta device): run the "
                "network once on an input, or load its weights, before passing it."
            )
    if copied:
        try:
            module = copy.deepcopy(module, _computed(module))
        except Exception as error:  # what a user's __deepcopy__ or unpicklable attribute raises
            raise UsageError(
                f"{reference} cannot be copied ({describe(error)}): pass it as file.py:function."
            ) from error
    try:
        module.eval()
    except NotImplementedError as error:  # what torch.export puts in the place of eval
        raise UsageError(
            f"{reference} is, or holds, a module that torch.export made, which has one mode only: return the "
            "ExportedProgram itself, or the network before it was exported."
        ) from error
    return module.float().cpu()


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel or torch.compile."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(module.module)
    inner = getattr(module, "_orig_mod", None)
    return _unwrap(inner) if isinstance(inner, nn.Module) else module


def _prepare_exported(
    program: ExportedProgram, reference: str, weights: str | None
) -> tuple[ExportedProgram, Metadata]:
    if weights is not None:
        raise UsageError(f"{reference} brings its own weights: leave --weights out.")
    tensors = [*program.state_dict.values(), *program.constants.values()]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise UsageError(
                f"{reference} was exported with {tensor.dtype} on {tensor.device.type}: export "
                "model.float().cpu() instead."
            )
    return program, Metadata(input_shape=_exported_input_shape(program))


def _exported_input_shape(program: ExportedProgram) -> tuple[int, int, int] | None:
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in inputs]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        return None
    sizes = values[0].shape[1:]
    if not all(isinstance(size, int) for size in sizes):  # a dynamic size is a SymInt
        return None
    channels, height, width = sizes
    return int(channels), int(height), int(width)
