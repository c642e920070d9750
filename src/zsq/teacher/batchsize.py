# SPDX-License-Identifier: Apache-2.0
"""Sizes that depend on the batch size, read where they are needed."""

from __future__ import annotations

from collections import deque

import torch
from torch.fx import Graph, Node

from zsq.teacher.layers import operator_name
from zsq.teacher.shapes import shape_of


def localise_batch_size(graph: Graph) -> None:
    """Let every reshape read the batch size from its own input.

    Export reads it once, from the network's input, and carries it to the end; a reconstruction unit
    cut out of the middle could not see it. Expressions of the batch size are recomputed likewise. What has
    no input that depends on the batch (a constant that is repeated for every image) reads it from the
    tensor computed last of those that are still needed.

    Args:
        graph: changed in place; tensors have a ``meta["shape"]``, scalars a ``meta["expression"]``, both of
            `zsq.teacher.shapes`.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        tensors = [n for n in node.all_input_nodes if not n.meta.get("scalar")]
        scalars = [n for n in node.all_input_nodes if n.meta.get("scalar")]
        if node.op != "call_function" or node.meta.get("scalar") or not tensors or not scalars:
            continue
        if not any(n.op != "get_attr" for n in tensors):
            tensors = _still_needed(node, order)[-1:] or tensors
        for scalar in scalars:
            with graph.inserting_before(node):
                node.replace_input_with(scalar, _local_scalar(graph, scalar, tensors[0]))
    graph.eliminate_dead_code()


def _still_needed(node: Node, order: dict[Node, int]) -> list[Node]:
    """Return the tensors that depend on the batch and are read behind a node, in execution order."""
    return [
        n for n, place in order.items()
        if place < order[node] and any(isinstance(size, str) for size in shape_of(n) or ())
        and any(order.get(user, -1) > order[node] for user in n.users if not user.meta.get("scalar"))
    ]  # fmt: skip


def _local_scalar(graph: Graph, scalar: Node, tensor: Node) -> Node:
    """Copy the arithmetic behind ``scalar``, reading sizes off ``tensor`` or what it came from."""
    assert callable(scalar.target)
    if operator_name(scalar.target) == "aten.sym_size.int":
        carrier = _carrier(tensor, scalar.meta["expression"])
        if carrier is None:
            return scalar
        copied = graph.call_function(scalar.target, carrier)
    else:
        arguments = torch.fx.map_arg(
            scalar.args,
            lambda n: _local_scalar(graph, n, tensor) if n.meta.get("scalar") else n,
        )
        copied = graph.call_function(scalar.target, arguments)
    copied.meta.update(scalar.meta)
    return copied


def _carrier(tensor: Node, expression: str) -> tuple[Node, int] | None:
    """Return the nearest tensor from ``tensor`` upstream that has a certain size, and the axis."""
    queue, seen = deque([tensor]), {tensor}
    while queue:
        node = queue.popleft()
        shape = shape_of(node) or ()
        if expression in shape:
            return node, shape.index(expression)
        for source in node.all_input_nodes:
            if source not in seen and not source.meta.get("scalar"):
                seen.add(source)
                queue.append(source)
    return None
