# SPDX-License-Identifier: Apache-2.0
"""Networks that compute where their input is.

Export writes down the device it ran on wherever a model asked for one, as in
``torch.zeros(len(x), 2, 8, 8, device=x.device)``. A network is moved to other devices, so it must not name one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from zsq.teacher.layers import operator_name, resolve_operator

#: Operators that make tensors out of sizes, and their forms that do so beside another tensor.
_FACTORIES = {
    "aten.zeros.default": "aten.new_zeros.default",
    "aten.ones.default": "aten.new_ones.default",
    "aten.full.default": "aten.new_full.default",
    "aten.empty.memory_format": "aten.new_empty.default",
}


def follow_input(graph: Graph) -> None:
    """Let no call of a graph name a device, as far as that can be said of tensors there are.

    What takes a tensor computes where that is. What makes one from sizes makes it where the tensors
    are that it is used with; such calls move to before the first that uses them.

    Args:
        graph: changed in place.
    """
    first = next(node for node in graph.nodes if node.op == "placeholder")
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = operator_name(node.target)
        if name in _FACTORIES and node.users:
            _beside(graph, node, _FACTORIES[name], first)
        elif name == "aten.to.device":  # self, device, dtype, ...
            node.target = resolve_operator("aten.to.dtype")
            node.args = (node.args[0], *node.args[2:])
            node.kwargs = _without(node, "device")
        elif any(not n.meta.get("scalar") for n in node.all_input_nodes):
            node.kwargs = _without(node, "device")


def _beside(graph: Graph, node: Node, name: str, first: Node) -> None:
    """Replace a call that makes a tensor by one that makes it where its user's other tensors are."""
    user = min(node.users)
    others = [n for n in user.all_input_nodes if n is not node and not n.meta.get("scalar")]
    there = next((n for n in others if operator_name(n.target) not in _FACTORIES), first)
    kwargs = _without(node, "device", "pin_memory", "layout", "memory_format")
    with graph.inserting_before(user):
        target: Any = resolve_operator(name)
        moved = graph.call_function(target, (there, *node.args), kwargs | {"dtype": _dtype(node)})
    moved.meta.update(node.meta)
    node.replace_all_uses_with(moved)
    graph.erase_node(node)


def _dtype(node: Node) -> Any:
    """Return the type of what a call makes: the one that it names, else what torch takes."""
    named = node.kwargs.get("dtype")
    if named is not None or operator_name(node.target) != "aten.full.default":
        return named or torch.float32
    value = node.args[1]
    return torch.float32 if isinstance(value, Node) else torch.tensor(value).dtype


def _without(node: Node, *names: str) -> dict[str, Any]:
    return {name: value for name, value in node.kwargs.items() if name not in names}
