# SPDX-License-Identifier: Apache-2.0
"""Block outputs, found on the graph, and networks that return some of their inner tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer, operator_name
from zsq.teacher.units import find_units


def tap_nodes(network: GraphModule, names: Sequence[str]) -> GraphModule:
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


def block_outputs(network: GraphModule, input_shape: tuple[int, ...]) -> list[str]:
    """Return the nodes that hold what each block computed, in execution order.

    A block is a reconstruction unit of two layers or more (of one, in a network that has no
    others). Its output is taken before activation and pooling, and before the addition of a skip:
    the branch with most layers, as HAST does for ResNets and MobileNets. Only feature maps count.

    Args:
        network: a float network.
        input_shape: of one image.
    """
    units = find_units(network)
    deep = [unit for unit in units if len(unit.layers) > 1] or units
    nodes = {node.name: node for node in network.graph.nodes}
    found = []
    for unit in deep:
        inside = [nodes[name] for name in unit.nodes]
        found.append(_computed(network, inside[-1], _depths(network, inside)).name)
    found = list(dict.fromkeys(found))
    with torch.no_grad():
        _, *values = tap_nodes(network, found)(torch.zeros(1, *input_shape))
    return [name for name, value in zip(found, values, strict=True) if value.ndim == 4]


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
        operands = [n for n in tensor_inputs(node) if n in depths]
        if len(operands) == 1 or (operands and operator_name(node.target) == "aten.add.Tensor"):
            node = max(operands, key=depths.__getitem__)
        else:
            break
    return node
