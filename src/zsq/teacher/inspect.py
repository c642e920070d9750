# SPDX-License-Identifier: Apache-2.0
"""What zsq understood of a network, before anything long starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.config import Bits, Override
from zsq.quantizers.protocol import COMMUTING, PROTOCOLS, Placement, place
from zsq.runtime.ambient import own_modes
from zsq.teacher.fold import find_pairs, fold_batch_norms, module_of
from zsq.teacher.layers import BatchNorm, Layer, operator_name
from zsq.teacher.regions import count_parts
from zsq.teacher.taps import batch_norm_nodes
from zsq.teacher.teacher import Teacher
from zsq.teacher.units import find_units

#: How the names of convolutions begin; those that are quantized are modules, not functions.
_CONVOLUTIONS = ("aten.conv", "aten._conv")
_PRODUCTS = frozenset({"aten.matmul.default", "aten.mm.default", "aten.bmm.default"})


@dataclass(frozen=True)
class Inspection:
    """Facts about a network.

    Attributes:
        model: what the user typed.
        input_shape: (C, H, W).
        mean: of the normalisation, a value per channel; None where unknown.
        std: likewise.
        parameters: number of parameters, and of what else operators hold in float.
        macs: multiply-accumulates of one image in convolutions and linear layers.
        float_bytes: parameters in float32.
        batch_norms: paths of batch norms with stored statistics.
        pairs: (layer, batch norm) paths that fold.
        floating: heavy operators that no protocol quantizes, see `floating_layers`.
        units: reconstruction units: name and layers.
        protocols: per protocol: layers and tensors per bit-width, expected bytes of the weights.
        layers: per layer: path, kind, weight shape, MACs, bits per protocol.
        tensors: per tensor that a protocol quantizes: its name, the layers and operators that read it,
            its shape for one image, bits per protocol or None.
    """

    model: str
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    parameters: int
    macs: int
    float_bytes: int
    batch_norms: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    floating: tuple[str, ...]
    units: tuple[dict[str, Any], ...]
    protocols: dict[str, dict[str, Any]]
    layers: tuple[dict[str, Any], ...]
    tensors: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain data, for JSON."""
        return asdict(self)


class _Shapes(Interpreter):
    """Notes the shapes of all tensors that a network computes."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.found: dict[str, torch.Size] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result.shape
        return result


@torch.no_grad()
def node_shapes(network: GraphModule, image: Tensor) -> dict[str, torch.Size]:
    """Return the shapes of the tensors that an image, (1, ...), becomes, by the node that computes them."""
    shapes = _Shapes(network)
    shapes.run(image)
    return shapes.found


def count_macs(network: GraphModule, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Return the multiply-accumulates of one image per layer path."""
    return _macs(network, node_shapes(network, torch.zeros(1, *input_shape)))


def _macs(network: GraphModule, shapes: dict[str, torch.Size]) -> dict[str, int]:
    macs = Counter[str]()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, Layer) and node.name in shapes:
            per_output = module.weight.numel() // module.weight.shape[0]
            macs[str(node.target)] += shapes[node.name].numel() * per_output
    return dict(macs)


def count_constants(network: GraphModule) -> int:
    """Return how many numbers operators other than layers and batch norms hold: PReLU, LayerNorm, embeddings."""
    holder = network._modules.get("constants")
    held = [] if holder is None else [b for b in holder.buffers() if b.is_floating_point()]
    return sum(b.numel() for b in held)


def floating_layers(network: GraphModule) -> tuple[str, ...]:
    """Return the convolutions and products that no protocol quantizes, as ``name (operator)``.

    Transposed convolutions, those whose weights are computed from the input, and matrix products with a
    stored tensor that is no linear layer's. They stay float, and an integer file of the network is refused.
    """
    found = []
    stored: set[Node] = set()  # tensors made of nothing but what the network holds
    for node in network.graph.nodes:
        name, sources = operator_name(node.target), node.all_input_nodes
        if node.op == "get_attr" or (sources and stored.issuperset(sources)):
            stored.add(node)
        product = name in _PRODUCTS and not stored.isdisjoint(sources)
        if node.op == "call_function" and (product or name.startswith(_CONVOLUTIONS)):
            found.append(f"{node.name} ({name.split('.')[1]})")
    return tuple(found)


@own_modes()
def inspect_teacher(
    teacher: Teacher, bits: Bits | None = None, overrides: Iterable[Override] = ()
) -> Inspection:
    """Look at a teacher.

    Args:
        teacher: from `zsq.load_teacher`.
        bits: low-bit widths to plan with; w4a4 by default.
        overrides: per-layer bits.

    Raises:
        UsageError: nothing to quantize.
    """
    bits = bits or Bits()
    folded = fold_batch_norms(teacher.network)
    placements = {name: place(folded, name, bits, tuple(overrides)) for name in PROTOCOLS}
    shapes = node_shapes(folded, torch.zeros(1, *teacher.info.input_shape))
    macs = _macs(folded, shapes)
    network = teacher.network
    parameters = sum(p.numel() for p in network.parameters()) + count_constants(network)
    return Inspection(
        model=teacher.info.reference,
        input_shape=teacher.info.input_shape,
        mean=teacher.info.mean,
        std=teacher.info.std,
        parameters=parameters,
        macs=sum(macs.values()),
        float_bytes=4 * parameters,
        batch_norms=tuple(str(n.target) for n in batch_norm_nodes(network)),
        pairs=tuple((p.layer, p.batch_norm) for p in find_pairs(network)),
        floating=floating_layers(folded),
        units=tuple(
            {"name": u.name, "layers": list(u.layers), "parts": count_parts(folded, u)}
            for u in find_units(folded)
        ),
        protocols={
            # all-low-bit keeps its batch norms
            name: _summary(network if name == "all-low-bit" else folded, placement)
            for name, placement in placements.items()
        },
        layers=tuple(
            _layer(folded, path, macs, placements) for path in placements["integer"].weights
        ),
        tensors=_tensors(folded, shapes, placements),
    )


def _layer(
    network: GraphModule, path: str, macs: dict[str, int], placements: dict[str, Placement]
) -> dict[str, Any]:
    layer = network.get_submodule(path)
    assert isinstance(layer, Layer)
    return {
        "path": path, "kind": layer.operator.split(".")[1], "weight": list(layer.weight.shape),
        "groups": layer.groups, "macs": macs.get(path, 0),
        "bits": {name: p.weights[path] for name, p in placements.items()},
    }  # fmt: skip


def _tensors(
    network: GraphModule, shapes: dict[str, torch.Size], placements: dict[str, Placement]
) -> tuple[dict[str, Any], ...]:
    quantized = {name for placement in placements.values() for name in placement.activations}
    return tuple(
        {
            "name": node.name, "read_by": _readers(network, node), "shape": list(shapes[node.name]),
            "bits": {name: p.activations.get(node.name) for name, p in placements.items()},
        }
        for node in network.graph.nodes if node.name in quantized
    )  # fmt: skip


def _readers(network: GraphModule, node: Node) -> list[str]:
    """Return the layers, by path, and the operators that read a tensor, reshaped or not."""
    found: list[str] = []
    for user in node.users:
        if operator_name(user.target) in COMMUTING:
            found += _readers(network, user)
        elif user.op == "call_module":
            found.append(str(user.target))
        elif user.op != "output" and not user.meta.get("scalar"):  # which reads a size alone
            found.append(operator_name(user.target).partition(".")[2].partition(".")[0])
    return list(dict.fromkeys(found))


def _summary(network: GraphModule, placement: Placement) -> dict[str, Any]:
    """Count layers and tensors per bit-width; expect packed codes plus 5 bytes a channel."""
    size = 0
    for path, bits in placement.weights.items():
        layer = network.get_submodule(path)
        assert isinstance(layer, Layer)
        channels = layer.weight.shape[0]
        size += -(-layer.weight.numel() * bits // 8) + channels * (
            5 + (4 if layer.bias is not None else 0)
        )
    rest = [m for m in network.modules() if isinstance(m, BatchNorm)]
    size += sum(16 * m.running_mean.numel() for m in rest) + 4 * count_constants(network)
    return {
        "weights": dict(sorted(Counter(f"{b} bits" for b in placement.weights.values()).items())),
        "activations": dict(sorted(Counter(f"{b} bits" for b in placement.activations.values()).items())),
        "bytes": size,
    }  # fmt: skip
