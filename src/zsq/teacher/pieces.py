# SPDX-License-Identifier: Apache-2.0
"""Cutting runnable pieces out of a network's graph. Pieces share their modules with the network."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, GraphModule, Node

from zsq.errors import UsageError


def _external_inputs(nodes: list[Node], names: set[str]) -> list[Node]:
    found: dict[Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if (
                source.name not in names
                and not source.meta.get("scalar")
                and source.op != "get_attr"
            ):
                found[source] = None
    return list(found)


def cut_piece(network: GraphModule, names: Collection[str], output: str) -> GraphModule:
    """Build the module that computes one piece of a network.

    Args:
        network: where the piece is cut from; its modules are shared, not copied.
        names: the nodes of the piece.
        output: the node whose value the piece returns.

    Returns:
        A module of one tensor. Its placeholder bears the name of the node it stands for.

    Raises:
        UsageError: the nodes need more than one tensor from outside.
    """
    wanted = set(names)
    inside = [n for n in network.graph.nodes if n.name in wanted and n.op != "placeholder"]
    external = _external_inputs(
        inside, wanted - {n.name for n in network.graph.nodes if n.op == "placeholder"}
    )
    if len(external) != 1:
        raise UsageError(
            f"the piece around {output!r} reads {len(external)} tensors from outside; it needs exactly one."
        )
    graph = Graph()
    copied: dict[Node, Node] = {external[0]: graph.placeholder(external[0].name)}

    def copy(node: Node) -> Node:
        if node not in copied:  # constants and sizes are brought along as needed
            for source in node.all_input_nodes:
                copy(source)
            copied[node] = graph.node_copy(node, lambda n: copied[n])
        return copied[node]

    result = external[0]
    for node in inside:
        copy(node)
        if node.name == output:
            result = node
    graph.output(copied[result])
    piece = GraphModule(network, graph)
    piece.graph.eliminate_dead_code()
    piece.recompile()
    piece.train(network.training)
    return piece


def nodes_up_to(network: GraphModule, name: str) -> list[str]:
    """Return the names of the nodes that ``name`` depends on, itself included, in execution order."""
    target = next(n for n in network.graph.nodes if n.name == name)
    needed, open_nodes = {target}, [target]
    while open_nodes:
        for source in open_nodes.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                open_nodes.append(source)
    return [n.name for n in network.graph.nodes if n in needed]
