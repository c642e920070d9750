# SPDX-License-Identifier: Apache-2.0
"""Networks, float or quantized, in one safetensors file: tensors, and the graph in the header.

A quantized layer's tensors are named as compressed-tensors does: ``<path>.weight_packed`` (codes,
densely packed), ``.weight_scale``, ``.weight_zero_point``; the shape is in the header.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.artifact.graphfile import graph_from_json, graph_to_json
from zsq.config import Recipe, load_recipe
from zsq.errors import UsageError
from zsq.functional.affine import Grid
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.packing import pack_codes, unpack_codes
from zsq.quantizers.protocol import Placement
from zsq.quantizers.weight import FrozenWeight
from zsq.runtime.checkpoints import load_tensors, save_tensors
from zsq.runtime.group import Group
from zsq.student import Student
from zsq.teacher.checkpoints import describe
from zsq.teacher.layers import LAYER_OPERATORS, BatchNorm, Layer
from zsq.teacher.teacher import ModelInfo, Teacher

#: Version of the file layout.
FORMAT = 1


def save_teacher(teacher: Teacher, path: Path) -> None:
    """Write a float network with what is known of it."""
    tensors, modules = _describe(teacher.network)
    header = {
        "format": FORMAT, "kind": "teacher", "graph": graph_to_json(teacher.network.graph),
        "modules": modules, "info": asdict(teacher.info),
    }  # fmt: skip
    save_tensors(path, tensors, header)


def load_saved_teacher(path: Path) -> Teacher:
    """Read what `save_teacher` wrote.

    Raises:
        UsageError: missing, truncated, or not such a file.
    """
    tensors, header = _read(path, "teacher")
    network = _rebuild(tensors, header, path)
    return Teacher(network.eval().requires_grad_(False), _info(header))


def save_student(student: Student, path: Path) -> None:
    """Write a frozen quantized network: packed integers, scales, graph, recipe."""
    tensors, modules = _describe(student.network)
    header = {
        "format": FORMAT, "kind": "student", "graph": graph_to_json(student.network.graph),
        "modules": modules, "info": asdict(student.info), "placement": asdict(student.placement),
        "recipe": student.recipe.model_dump(mode="json"),
    }  # fmt: skip
    save_tensors(path, tensors, header)


def load_student(path: Path) -> Student:
    """Read what `save_student` wrote; the model's original script is not needed.

    Raises:
        UsageError: missing, truncated, or not such a file.
    """
    tensors, header = _read(path, "student")
    network = _rebuild(tensors, header, path)
    try:
        placement = Placement(**header["placement"])
        recipe: Recipe = load_recipe(Recipe.model_validate(header["recipe"]))
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    student = Student(network, placement, _info(header), recipe)
    student.finished = True
    return student.requires_grad_(False).eval()


def load_shared_student(path: Path, group: Group) -> Student:
    """Read a student on all processes of a group; only process 0 has the file.

    Raises:
        UsageError: missing, truncated, or not such a file.
    """
    if group.size == 1:
        return load_student(path)
    mine = load_student(path) if group.rank == 0 else None
    content = bytearray(path.read_bytes()) if mine else bytearray(1)
    shared = group.share({"file": torch.frombuffer(content, dtype=torch.uint8)})["file"]
    if mine is not None:
        return mine
    with tempfile.TemporaryDirectory() as folder:
        received = Path(folder) / "student.safetensors"
        received.write_bytes(shared.numpy().tobytes())
        return load_student(received)


def fingerprint(network: GraphModule) -> str:
    """Return a hash of a network's graph and weights, equal for equal networks."""
    graph = graph_to_json(network.graph)
    for node in graph:  # what follows from the rest, and files of versions before do not have
        del node["shape"]
    digest = hashlib.sha256(json.dumps(graph, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _describe(network: GraphModule) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    used = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    for path in sorted(used):
        module = network.get_submodule(path)
        if isinstance(module, QuantizedLayer):
            _describe_quantized(path, module, tensors, modules)
        elif isinstance(module, ActivationQuantizer):
            modules[path] = {
                "kind": "activation", "bits": module.bits, "low": module.low, "high": module.high,
            }  # fmt: skip
            tensors[f"{path}.scale"], tensors[f"{path}.zero_point"] = (
                module.scale,
                module.zero_point,
            )
        elif isinstance(module, Layer):
            modules[path] = {
                "kind": "layer",
                "operator": module.operator,
                "arguments": module.arguments,
            }
            tensors[f"{path}.weight"] = module.weight
            if module.bias is not None:
                tensors[f"{path}.bias"] = module.bias
        elif isinstance(module, BatchNorm):
            modules[path] = {"kind": "batch_norm", "eps": module.eps}
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensors[f"{path}.{name}"] = getattr(module, name)
    for node in network.graph.nodes:
        if node.op == "get_attr":
            tensors[str(node.target)] = _buffer(network, str(node.target))
    return tensors, modules


def _buffer(network: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    value = getattr(network.get_submodule(parent), name)
    assert isinstance(value, Tensor)
    return value


def _describe_quantized(
    path: str, layer: QuantizedLayer, tensors: dict[str, Tensor], modules: dict[str, dict[str, Any]]
) -> None:
    frozen = layer.frozen
    modules[path] = {
        "kind": "quantized_layer", "operator": layer.operator, "arguments": layer.arguments,
        "bits": frozen.bits, "shape": list(frozen.integers.shape),
    }  # fmt: skip
    tensors[f"{path}.weight_packed"] = pack_codes(frozen.integers, frozen.bits)
    tensors[f"{path}.weight_scale"] = frozen.scale
    tensors[f"{path}.weight_zero_point"] = frozen.zero_point.to(torch.uint8)
    if layer.bias is not None:
        tensors[f"{path}.bias"] = layer.bias


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = load_tensors(path)
    if not isinstance(header, dict):
        raise UsageError(f"{path} is damaged: its header is no mapping.")
    if header.get("kind") != kind or header.get("format") != FORMAT:
        raise UsageError(
            f"{path} holds {header.get('kind', 'something else')!r} in format {header.get('format')}, not a "
            f"{kind} in format {FORMAT}; it was not written by this version of zsq."
        )
    return tensors, header


def _info(header: dict[str, Any]) -> ModelInfo:
    try:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in header["info"].items()
        }
        return ModelInfo(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the file's header is damaged: {error}") from error


def _rebuild(tensors: dict[str, Tensor], header: dict[str, Any], path: Path) -> GraphModule:
    root = nn.Module()
    try:
        for name, description in sorted(header["modules"].items()):
            _add(root, name, _module(name, description, tensors))
        for entry in header["graph"]:
            if entry["op"] == "get_attr":
                parent, _, last = entry["target"].rpartition(".")
                _container(root, parent).register_buffer(last, tensors[entry["target"]])
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged ({describe(error)}).") from error
    return graph_from_json(header["graph"], root)


def _module(path: str, description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    kind = description["kind"]
    if kind == "layer":
        arguments = _arguments(description)
        return Layer(
            _operator(description),
            tensors[f"{path}.weight"],
            tensors.get(f"{path}.bias"),
            arguments,
        )
    if kind == "batch_norm":
        parts = [
            tensors[f"{path}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
        ]
        return BatchNorm(parts[0], parts[1], parts[2], parts[3], float(description["eps"]))
    if kind == "activation":
        quantizer = ActivationQuantizer(int(description["bits"]), log_scale=False)
        scale = _scale(tensors, f"{path}.scale")
        zero_point = tensors[f"{path}.zero_point"].float()
        quantizer.set_grid(Grid(scale, zero_point, torch.zeros(())))
        quantizer.low, quantizer.high = int(description["low"]), int(description["high"])
        return quantizer
    if kind == "quantized_layer":
        bits = int(description["bits"])
        codes = unpack_codes(tensors[f"{path}.weight_packed"], bits, tuple(description["shape"]))
        zero_point = tensors[f"{path}.weight_zero_point"].float()
        weight = FrozenWeight(codes, _scale(tensors, f"{path}.weight_scale"), zero_point, bits)
        return QuantizedLayer(
            _operator(description), _arguments(description), weight, tensors.get(f"{path}.bias")
        )
    raise UsageError(f"the file holds an unknown kind of module {kind!r}.")


def _scale(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return a quantizer's steps."""
    scale = tensors[name]
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UsageError(
            f"the file holds {name!r}, which are no steps of a grid: not all are finite and above 0; it is damaged."
        )
    return scale


def _operator(description: dict[str, Any]) -> str:
    """Return which layer's operator a file names: it calls nothing else with weights."""
    operator = description["operator"]
    if operator not in LAYER_OPERATORS:
        raise UsageError(
            f"the file holds a layer that calls {operator!r}; it is damaged or not zsq's. Allowed: "
            f"{', '.join(sorted(LAYER_OPERATORS))}."
        )
    return str(operator)


def _arguments(description: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(description["arguments"])


def _container(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module at a path; paths come sorted, so parents are there before their children."""
    parent, _, last = path.rpartition(".")
    _container(root, parent).add_module(last, module)
