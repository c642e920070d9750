# SPDX-License-Identifier: Apache-2.0
"""One spelling for what exported graphs say in several ways, and what says nothing in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

#: Operators without effect here. Copies have one only on who sees a later write to them.
COPIES = frozenset({"clone", "lift_fresh_copy"})
ALIASES = frozenset(
    {"alias", "detach", "detach_", "contiguous"}
    | {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "native_dropout"}
)
ASSERTIONS = ("_assert", "sym_constrain")
#: Contiguity copies are dropped, so a view may meet any layout; reshape does the same then.
_VIEWS = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}
#: Operators, and the number that they change nothing with.
_NEUTRAL = {"aten.mul.Tensor": 1, "aten.div.Tensor": 1, "aten.add.Tensor": 0, "aten.sub.Tensor": 0}

_CLAMPS = frozenset({"aten.clamp.default", "aten.clip.default", "aten.clamp_min.default"})


def changes_nothing(node: Node, name: str) -> bool:
    """Whether a node multiplies or divides by 1, or adds or subtracts 0, as configurable blocks do.

    Such nodes vanish when the network is exported, and quantizers on either side of them would meet.
    """
    source = node.args[0] if node.args else None
    if name not in _NEUTRAL or len(node.args) != 2 or node.kwargs or not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    same = isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    return same and isinstance(node.args[1], int | float) and node.args[1] == _NEUTRAL[name]


def respelled(node: Node, name: str, arguments: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """Return an operator and its arguments as the rest of zsq knows them.

    Activations that are written as clamps at zero or as thresholds are ReLUs and bounded ReLUs to whoever
    looks for these: protocols, equalization, the exporter.

    Args:
        node: of the exported graph.
        name: of its operator, or of that which does the same without writing into its operand.
        arguments: of the new call.
    """
    value, name = node.meta.get("val"), _VIEWS.get(name, name)
    floating = isinstance(value, Tensor) and value.dtype == torch.float32
    if not floating or node.kwargs:
        return name, arguments
    x, *bounds = arguments
    if name in _CLAMPS and _is_zero(*bounds[:1]):
        high = bounds[1] if len(bounds) > 1 else None
        if high is None:
            return "aten.relu.default", (x,)
        if isinstance(high, int | float) and high > 0:
            return "aten.hardtanh.default", (x, 0.0, float(high))
    if name == "aten.threshold.default" and len(bounds) == 2 and all(map(_is_zero, bounds)):
        return "aten.relu.default", (x,)
    return name, arguments


def _is_zero(bound: object = None) -> bool:
    return isinstance(bound, int | float) and bound == 0
