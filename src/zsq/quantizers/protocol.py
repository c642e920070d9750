# SPDX-License-Identifier: Apache-2.0
"""Protocols: which weights and which edges of a network are quantized, and to how many bits.

Accuracy means nothing without the protocol, so it is a named object, decided on the graph:

* ``edges-8bit`` (GENIE, BRECQ, QDrop): inputs of layers and skip operands of additions; first and
  last weights, the second layer's input and the last layer's input at 8 bits; network input float.
* ``integer`` (deployment): every edge, so that a runtime computes in integers throughout; edges
  that ``edges-8bit`` leaves float get 8 bits; logits stay float.
* ``all-low-bit`` (GDFQ, Qimera, AutoReCon, AIT, HAST): every weight low-bit; activations after
  each ReLU or ReLU6 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.fx import GraphModule, Node

from zsq.config import Bits, Override
from zsq.errors import UsageError
from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer, operator_name
from zsq.teacher.units import is_tuple

#: Operators that only move or select values: quantizing before or after them is the same.
COMMUTING = frozenset({
    "aten.max_pool2d.default", "aten.max_pool1d.default", "aten.max_pool3d.default",
    "aten.adaptive_max_pool2d.default", "aten.max_pool2d_with_indices.default", "operator.getitem",
    "aten.reshape.default", "aten.flatten.using_ints", "aten.transpose.int", "aten.permute.default",
    "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default", "aten.unsqueeze.default",
    "aten.slice.Tensor", "aten.select.int", "aten.chunk.default", "aten.split.Tensor",
    "aten.split_with_sizes.default", "aten.expand.default", "aten.channel_shuffle.default",
    "aten.pixel_shuffle.default", "aten.upsample_nearest2d.vec", "aten.unfold.default",
})  # fmt: skip
#: Activation functions that clip: they disappear into the range of the quantizer behind them.
CLAMPS = frozenset({"aten.relu.default", "aten.relu6.default", "aten.hardtanh.default"})
ADDITIONS = frozenset({"aten.add.Tensor"})
_TUPLES = frozenset({"aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default",
                     "aten.max_pool2d_with_indices.default", "aten.adaptive_max_pool2d.default"})  # fmt: skip
_ROOTS = frozenset({
    "aten.sqrt.default", "aten.rsqrt.default", "aten.reciprocal.default", "aten.log.default",
})  # fmt: skip
#: What norms and shares are made of, before a root or behind it.
_SUMS = frozenset({
    "aten.add.Tensor", "aten.add.Scalar", "aten.mul.Tensor", "aten.mean.dim", "aten.sum.dim_IntList",
    "aten.pow.Tensor_Scalar", "aten.square.default", "aten.var.correction", "aten.var.dim", "aten.var.unbiased",
    "aten.std.correction", "aten.clamp.default", "aten.clamp_min.default", "aten.clamp_min.Tensor",
    "aten.maximum.default", "aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.expand.default",
    "aten.unsqueeze.default", "aten.sub.Tensor", "aten.exp.default", "aten.expand_as.default",
})  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """What a protocol quantizes in one network.

    Attributes:
        protocol: its name.
        weights: bits of each layer, by module path, in execution order.
        activations: bits of each quantized tensor, by the name of the node that produces it.
        shared: nodes whose result must be put on another node's grid again (it is there already;
            integer runtimes want to be told), as {node: node that owns the quantizer}.
    """

    protocol: str
    weights: dict[str, int]
    activations: dict[str, int]
    shared: dict[str, str]


def origin(node: Node) -> Node:
    """Follow value-preserving operators back to the node that computed the values."""
    while commutes(node) and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    return node


def commutes(node: Node) -> bool:
    """Whether a node only moves or selects values of what it reads; one result of several, as of an LSTM, is new."""
    name = operator_name(node.target)
    if name == "operator.getitem":
        return operator_name(tensor_inputs(node)[0].target) in _TUPLES
    return name in COMMUTING


def layer_nodes(network: GraphModule) -> list[Node]:
    """Return the nodes that call a layer, in execution order."""
    return [n for n in network.graph.nodes if isinstance(module_of(network, n), Layer)]


def _straight_from_layer(network: GraphModule, node: Node) -> bool:
    module = module_of(network, node)
    if isinstance(module, BatchNorm):
        return isinstance(module_of(network, tensor_inputs(node)[0]), Layer)
    return isinstance(module, Layer)


def _layer_inputs(network: GraphModule, bits: Bits, edge_bits: int) -> dict[Node, int]:
    """Inputs of layers and skip operands, with their bits: the placement of ``edges-8bit``."""
    layers = layer_nodes(network)
    found: dict[Node, int] = {}
    for layer in layers[1:]:
        source = origin(tensor_inputs(layer)[0])
        wanted = edge_bits if layer is layers[-1] else bits.activations
        found[source] = max(found.get(source, 0), wanted)
    for node in network.graph.nodes:
        operands = tensor_inputs(node)
        if operator_name(node.target) in ADDITIONS and len(operands) == 2:
            for source in map(origin, operands):
                if not _straight_from_layer(network, source):
                    found.setdefault(source, bits.activations)
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    first = order[layers[0]]
    found = {n: b for n, b in found.items() if order[n] >= first}  # what precedes it is the input
    if found:
        found[min(found, key=order.__getitem__)] = edge_bits
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _edges_8bit(network: GraphModule, bits: Bits) -> tuple[dict[Node, int], dict[Node, Node]]:
    return _layer_inputs(network, bits, 8), {}


def _all_low_bit(network: GraphModule, bits: Bits) -> tuple[dict[Node, int], dict[Node, Node]]:
    clamps = [n for n in network.graph.nodes if operator_name(n.target) in CLAMPS]
    delicate = _delicate(network)
    return {n: bits.activations for n in clamps if n not in delicate}, {}


def _integer(network: GraphModule, bits: Bits) -> tuple[dict[Node, int], dict[Node, Node]]:
    return _every_edge(network, _layer_inputs(network, bits, 8))


def _every_edge(
    network: GraphModule, inner: dict[Node, int]
) -> tuple[dict[Node, int], dict[Node, Node]]:
    """Extend a placement to every edge that an integer runtime computes."""
    output = next(n for n in network.graph.nodes if n.op == "output")
    logits = origin(output.all_input_nodes[0])
    activations: dict[Node, int] = {}
    shared: dict[Node, Node] = {}
    delicate = _delicate(network) - set(inner)
    for node in network.graph.nodes:
        if node.op in {"output", "get_attr"} or node.meta.get("scalar") or origin(node) is logits:
            continue
        if node in delicate:
            continue
        if commutes(node):
            if operator_name(node.target) not in _TUPLES:
                shared[node] = origin(node)
        elif not (is_tuple(node) or _only_feeds_clamp(node)):
            activations[node] = inner.get(node, 8)
    return activations, shared


def _delicate(network: GraphModule) -> set[Node]:
    """Return the tensors that lead to roots and denominators alone, with the roots, as a norm's variance does.

    On a linear grid of 256 codes a small variance is 0, and what is divided by it infinite: runtimes are to
    compute these in float, as they do inside of a layer norm.
    """
    found: set[Node] = set()
    for node in reversed(list(network.graph.nodes)):
        name = operator_name(node.target)
        readers = [user for user in node.users if not user.meta.get("scalar")]
        divides = [_divides_by(user, node) or user in found for user in readers]
        sums = name in _SUMS or name in CLAMPS  # a variance may be kept from falling below 0
        if name in _ROOTS or (sums and divides and all(divides)):
            found.add(node)
    return found


def _divides_by(reader: Node, node: Node) -> bool:
    """Whether a node takes a root of another, or has it as a denominator."""
    name, arguments = operator_name(reader.target), reader.args
    divided = len(arguments) > 1 and arguments[1] is node and arguments[0] is not node
    return name in _ROOTS or (name == "aten.div.Tensor" and divided)


def _only_feeds_clamp(node: Node) -> bool:
    return len(node.users) == 1 and operator_name(next(iter(node.users)).target) in CLAMPS


_PLACERS: dict[str, Callable[[GraphModule, Bits], tuple[dict[Node, int], dict[Node, Node]]]] = {
    "edges-8bit": _edges_8bit,
    "integer": _integer,
    "all-low-bit": _all_low_bit,
}
PROTOCOLS = tuple(_PLACERS)


def place(
    network: GraphModule, protocol: str, bits: Bits, overrides: Iterable[Override] = ()
) -> Placement:
    """Decide what is quantized.

    Args:
        network: the teacher's network; batch norms folded for ``edges-8bit`` and ``integer``.
        protocol: one of `PROTOCOLS`.
        bits: low-bit widths of weights and activations.
        overrides: bits by glob on the layer's path or the tensor's name; the last match wins.

    Raises:
        UsageError: unknown protocol, no layer to quantize, or an override that matches nothing.
    """
    if protocol not in _PLACERS:
        raise UsageError(f"protocol {protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}.")
    layers = layer_nodes(network)
    if not layers:
        raise UsageError(
            "the network has no convolution or linear layer with a stored weight; nothing to "
            "quantize."
        )
    paths = list(dict.fromkeys(str(n.target) for n in layers))
    weights = dict.fromkeys(paths, bits.weights)
    if protocol != "all-low-bit":
        weights[paths[0]] = weights[paths[-1]] = 8
    activations, shared = _PLACERS[protocol](network, bits)
    _override(overrides, layers, weights, activations)
    return Placement(
        protocol, weights, {n.name: b for n, b in activations.items()},
        {n.name: source.name for n, source in shared.items() if source in activations},
    )  # fmt: skip


def _matched(layers: list[Node], pattern: str) -> list[Node]:
    """Return the layers whose path a pattern matches."""
    return [node for node in layers if fnmatchcase(str(node.target), pattern)]


def _override(
    overrides: Iterable[Override],
    layers: list[Node],
    weights: dict[str, int],
    activations: dict[Node, int],
) -> None:
    for override in overrides:
        if override.match is None:
            _override_edges(override, activations)
            continue
        matched = _matched(layers, override.match)
        if not matched:
            raise UsageError(
                f"the override for {override.match!r} matches no layer; `zsq inspect` lists their "
                "names."
            )
        for node in matched:
            if override.weights is not None:
                weights[str(node.target)] = override.weights
            source = origin(tensor_inputs(node)[0])
            if override.activations is not None and source in activations:
                activations[source] = override.activations


def _override_edges(override: Override, activations: dict[Node, int]) -> None:
    matched = [node for node in activations if fnmatchcase(node.name, str(override.edge))]
    if not matched:
        raise UsageError(
            f"the override for {override.edge!r} matches no tensor that is quantized, {_some(activations)}; "
            "`zsq inspect` lists their names."
        )
    for node in matched:
        activations[node] = override.activations or activations[node]


def _some(activations: dict[Node, int]) -> str:
    names = [node.name for node in activations]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_overrides(
    network: GraphModule, placement: Placement, overrides: Iterable[Override]
) -> None:
    """Refuse an override that asks for nothing, or for what would not be done: bits of activations in float.

    Raises:
        UsageError: no bits are given, or none of the layers that it matches reads a quantized tensor.
    """
    for override in overrides:
        if override.weights is None and override.activations is None:
            raise UsageError(
                f"the override for {override.match or override.edge!r} gives no bits; add weights, activations, or "
                "both."
            )
        if override.match is None:
            continue  # `place` has found its tensors
        matched = _matched(layer_nodes(network), override.match)
        read = {origin(tensor_inputs(node)[0]).name for node in matched}
        if override.activations is not None and not read & set(placement.activations):
            raise UsageError(
                f"the override for {override.match!r} gives activations {override.activations} bits, and "
                f"protocol {placement.protocol!r} leaves what those layers read in float; leave `activations` "
                "out, or choose another protocol."
            )


def extend_to_integer(network: GraphModule, placement: Placement) -> Placement:
    """Return the ``integer`` placement that keeps every choice of ``placement``.

    This is what export applies to a student of any protocol: its own tensors keep their bits and
    the edges it left float get 8.
    """
    nodes = {n.name: n for n in network.graph.nodes}
    inner = {nodes[name]: bits for name, bits in placement.activations.items()}
    activations, shared = _every_edge(network, inner)
    return Placement(
        "integer", placement.weights, {n.name: b for n, b in activations.items()},
        {n.name: source.name for n, source in shared.items() if source in activations},
    )  # fmt: skip
