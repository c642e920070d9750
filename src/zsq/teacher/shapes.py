# SPDX-License-Identifier: Apache-2.0
"""Shapes of a network's tensors, as export noted them: batch sizes are not known, the others are."""

from __future__ import annotations

import re

from torch import Tensor
from torch.fx import Node

#: Sizes; those that depend on the batch size N are expressions such as ``"N"`` or ``"4*N"``.
Shape = tuple[int | str, ...]


def expression_of(value: object) -> str:
    """Write a size that depends on the batch size, however export calls that."""
    return re.sub(r"\bs\d+\b", "N", str(value))


def noted_shape(value: Tensor) -> Shape:
    """Return the shape of what export noted of a node's result."""
    sizes = [expression_of(size) for size in value.shape]
    return tuple(int(size) if size.isdigit() else size for size in sizes)


def shape_of(node: Node) -> Shape | None:
    """Return the shape of a node's result; None for several results, and in networks saved by versions before."""
    shape: Shape | None = node.meta.get("shape")
    return shape


def last_axis(node: Node) -> int:
    """Return the last axis of a node's result: that of the features where its shape is not known."""
    shape = shape_of(node)
    return 1 if shape is None else len(shape) - 1


def is_batch_first(node: Node) -> bool:
    """Whether the first axis of a node's value counts images: those of others cannot be dealt out in batches."""
    shape = shape_of(node)
    return shape is None or shape[:1] == ("N",)
