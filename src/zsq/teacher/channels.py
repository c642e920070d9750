# SPDX-License-Identifier: Apache-2.0
"""Which axis of each tensor carries a network's channels.

A convolution's are on the second axis, as a batch norm's are; a linear layer's are on the last, which on tokens
or maps is another one. Equal sizes say nothing: a map may be as wide as it has channels.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import GraphModule, Node

from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer, operator_name
from zsq.teacher.shapes import Shape, last_axis, shape_of

_RESHAPES = frozenset({
    "aten.flatten.using_ints", "aten.reshape.default", "aten.view.default",
})  # fmt: skip
_SAME = frozenset({"aten.relu.default", "aten.leaky_relu.default", "aten.dropout.default"})


def input_axis(layer: Layer, source: Node) -> int:
    """Return on which axis of what it reads a layer's input channels are."""
    return last_axis(source) if layer.is_linear else 1


def channel_axes(network: GraphModule) -> dict[Node, int]:
    """Return on which axis each tensor carries channels; tensors that do not are missing.

    They start at layers and batch norms. Operators that treat every channel alike hand them on.
    """
    axes: dict[Node, int] = {}
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, Layer):
            axes[node] = last_axis(node) if module.is_linear else 1
        elif isinstance(module, BatchNorm):
            axes[node] = 1
        else:
            sources = tensor_inputs(node)
            found = {_handed_on(node, s, axes[s]) if s in axes else None for s in sources}
            axis = found.pop() if len(found) == 1 else None
            if axis is not None:
                axes[node] = axis
    return axes


def _handed_on(node: Node, source: Node, axis: int) -> int | None:
    """Return on which axis an operator's result has the channels of its operand; None if on none."""
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None:
        return axis
    name = operator_name(node.target)
    if name in _SAME:
        return axis
    if name == "aten.add.Tensor":
        return axis if before == after else None  # and not stretched over an axis
    if name == "aten.mean.dim":
        return _after_mean(node, axis, len(before), len(after))
    if name in _RESHAPES:
        return _after_reshape(before, after, axis)
    pools = "pool2d" in name and len(before) == 4
    return axis if pools and axis == 1 else None


def _after_mean(node: Node, axis: int, before: int, after: int) -> int | None:
    arguments: Any = node.args
    averaged = {dim % before for dim in arguments[1] or range(before)}
    if axis in averaged:
        return None
    return axis if before == after else axis - sum(dim < axis for dim in averaged)


def _after_reshape(before: Shape, after: Shape, axis: int) -> int | None:
    """Return the axis that has as many values on every side of it as the channels' had."""

    def sides(shape: Shape, place: int) -> tuple[object, ...]:
        inner = [size for size in (*shape[1:place], *shape[place:]) if isinstance(size, str)]
        outer = prod(size for size in shape[1:place] if isinstance(size, int))
        return shape[0], outer, shape[place], inner

    wanted = sides(before, axis)
    return next((i for i in range(1, len(after)) if sides(after, i) == wanted), None)
