# SPDX-License-Identifier: Apache-2.0
"""Block outputs, found on the graph, and networks that return some of their inner tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from zsq.teacher.channels import channel_axes
from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer, operator_name
from zsq.teacher.shapes import shape_of
from zsq.teacher.units import Unit, find_units, is_tuple


def tap_nodes(network: GraphModule, names: Iterable[str]) -> GraphModule:
    """Return the same network, modules shared, that returns its output and the values of some nodes.

    Args:
        network: of any kind; not changed.
        names: of nodes.

    Returns:
        A network whose output is (output, value, value, ...).
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(network.graph, copies)
    wanted = {node.name: copies[node] for node in network.graph.nodes if node in copies}
    graph.output((output, *(wanted[name] for name in names)))
    return GraphModule(network, graph)


def block_outputs(network: GraphModule, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Return the nodes that hold what each block computed, in execution order, and their channels' axis.

    A block is a reconstruction unit of two layers or more (of one, where none of these puts out a
    feature map). Its output is taken before activation and pooling, and before the addition of a skip:
    the branch with most layers, as HAST does for ResNets and MobileNets. Only feature maps count.

    Args:
        network: a float network.
        input_shape: of one image.
    """
    units = find_units(network)
    deep = [unit for unit in units if len(unit.layers) > 1]
    return _feature_maps(network, deep, input_shape) or _feature_maps(network, units, input_shape)


def _feature_maps(
    network: GraphModule, units: Sequence[Unit], input_shape: tuple[int, ...]
) -> dict[str, int]:
    """Return which units' results are feature maps, and the axis of their channels."""
    nodes = {node.name: node for node in network.graph.nodes}
    found: dict[str, Node] = {}
    for unit in units:
        inside = [nodes[name] for name in unit.nodes]
        node = _computed(network, inside[-1], _depths(network, inside))
        found[node.name] = node
    with torch.no_grad():
        _, *values = tap_nodes(network, list(found))(torch.zeros(1, *input_shape))
    maps = {
        name: node
        for (name, node), value in zip(found.items(), values, strict=True)
        if isinstance(value, Tensor) and value.ndim == 4
    }
    axes = channel_axes(network)
    return {name: _channel_axis(node, axes) for name, node in maps.items()}


def _channel_axis(node: Node, axes: dict[Node, int]) -> int:
    """Return the axis that carries a feature map's channels: that of what it was computed from, value by value."""
    while node not in axes:
        alike = [n for n in tensor_inputs(node) if shape_of(n) == shape_of(node)]
        if not alike:
            return 1
        node = alike[0]
    return axes[node]


def _depths(network: GraphModule, nodes: Sequence[Node]) -> dict[Node, int]:
    """Map a unit's nodes to the most layers on a way from its start to them."""
    depths: dict[Node, int] = {}
    for node in nodes:
        below = max((depths.get(n, 0) for n in tensor_inputs(node)), default=0)
        depths[node] = below + isinstance(module_of(network, node), Layer)
    return depths


def _computed(network: GraphModule, node: Node, depths: dict[Node, int]) -> Node:
    """Walk from a unit's end back to what its deepest branch computed."""
    while not isinstance(module_of(network, node), (Layer, BatchNorm)):
        operands = tensor_inputs(node)
        inside = [n for n in operands if n in depths]
        added = operator_name(node.target) in {"aten.add.Tensor", "aten.sub.Tensor"}
        if not inside or (len(operands) > 1 and not added):  # as where a gate scales a map
            break
        deepest = max(inside, key=depths.__getitem__)
        if is_tuple(deepest):  # of what puts out several tensors, as an LSTM, one is read
            break
        node = deepest
    return node
