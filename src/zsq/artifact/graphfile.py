# SPDX-License-Identifier: Apache-2.0
"""A network's graph as JSON: nodes, standard operators and plain values, never code."""

from __future__ import annotations

import re
from keyword import iskeyword
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from zsq.errors import UsageError
from zsq.teacher.layers import operator_name, resolve_operator

_NAME = re.compile(r"[A-Za-z_]\w*")
_PATH = re.compile(r"\w+(\.\w+)*")
_TORCH_VALUES = {
    "dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout,
}  # fmt: skip


def graph_to_json(graph: Graph) -> list[dict[str, Any]]:
    """Return the graph's nodes as JSON-ready dictionaries, in execution order."""
    return [_node_to_json(node) for node in graph.nodes]


def _node_to_json(node: Node) -> dict[str, Any]:
    target = operator_name(node.target) if node.op == "call_function" else str(node.target)
    return {
        "name": node.name, "op": node.op, "target": target,
        "args": [_encode(a) for a in node.args],
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        "path": node.meta.get("path", ""), "scalar": bool(node.meta.get("scalar", False)),
        "shape": list(node.meta["shape"]) if "shape" in node.meta else None,
    }  # fmt: skip


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, cls in _TORCH_VALUES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(
        f"the network holds a value of type {type(value).__name__}, which cannot be saved."
    )


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(v, nodes) for v in content)
    if kind == "slice":
        return slice(*(_decode(v, nodes) for v in content))
    if kind == "device" and content in {"cpu", "cuda"}:
        return torch.device(content)
    found = getattr(torch, str(content), None) if kind in _TORCH_VALUES else None
    if found is None or not isinstance(found, _TORCH_VALUES[kind]):
        raise UsageError(f"the saved network holds an unknown value {kind}: {content!r}.")
    return found


def graph_from_json(data: list[dict[str, Any]], root: nn.Module) -> GraphModule:
    """Rebuild a graph over the modules and buffers of ``root``.

    Args:
        data: from `graph_to_json`.
        root: holds what the nodes call and read.

    Raises:
        UsageError: malformed data, an operator that is not allowed, or a module that is missing.
    """
    graph = Graph()
    nodes: dict[str, Node] = {}
    try:
        for entry in data:
            nodes[_checked(entry["name"], _NAME)] = _node_from_json(graph, entry, nodes)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"the saved network's graph is damaged: {type(error).__name__} {error}."
        ) from error
    kinds = [node.op for node in graph.nodes]
    if kinds.count("placeholder") != 1 or kinds.count("output") != 1 or kinds[-1] != "output":
        raise UsageError(
            "the saved network's graph is damaged: it has not one input and, at its end, one output."
        )
    try:
        graph.lint()
        return GraphModule(root, graph)
    except (RuntimeError, SyntaxError, RecursionError, AttributeError) as error:
        raise UsageError(
            f"the saved network's graph is damaged: {type(error).__name__} {str(error)[:100]}."
        ) from error


def _node_from_json(graph: Graph, entry: dict[str, Any], nodes: dict[str, Node]) -> Node:
    op, target = entry["op"], entry["target"]
    args = tuple(_decode(a, nodes) for a in entry["args"])
    kwargs = {_checked(k, _NAME): _decode(v, nodes) for k, v in entry["kwargs"].items()}
    if op == "call_function":
        target = resolve_operator(target)
    elif op in {"call_module", "get_attr"}:
        _checked(target, _PATH)
    elif op in {"placeholder", "output"}:
        _checked(target, _NAME)
    else:
        raise UsageError(f"the saved network's graph holds an unknown kind of node {op!r}.")
    node = graph.create_node(op, target, args, kwargs, name=entry["name"])
    node.meta["path"], node.meta["scalar"] = entry["path"], entry["scalar"]
    shape = entry.get("shape")  # versions before wrote none
    if shape is not None:
        if not all(isinstance(size, int | str) for size in shape):
            raise ValueError(f"the shape {shape!r} of {entry['name']}")
        node.meta["shape"] = tuple(shape)
    return node


def _checked(text: str, pattern: re.Pattern[str]) -> str:
    """Names end up in generated code, so nothing but plain identifiers passes."""
    if not isinstance(text, str) or not pattern.fullmatch(text) or iskeyword(text):
        raise UsageError(
            f"the saved network's graph holds the name {text!r}; it is damaged or not zsq's."
        )
    return text
