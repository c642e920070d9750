# SPDX-License-Identifier: Apache-2.0
"""Reconstruction units: single-entry, single-exit pieces of a network, found on its graph.

A position of the execution order is a *cut point* when nothing computed before it is needed after
it. A residual addition keeps its skip value alive across the branch, so a residual block has no cut
inside and falls out as one unit, and so do squeeze-and-excite gates, inception branches and
attention. No list of class names is involved (BRECQ, arXiv 2102.05426, calls these units blocks).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from zsq.teacher.fold import module_of
from zsq.teacher.layers import Layer
from zsq.teacher.shapes import is_batch_first

#: Chains of at most this many single-layer units are merged when they make up one module.
MAX_CHAIN = 4
#: A unit of more layers is tuned in parts: blocks inside it, and single layers between them.
MAX_LAYERS = 16


@dataclass(frozen=True)
class Unit:
    """One reconstruction unit.

    Attributes:
        name: the innermost module path that holds all its layers, or the layer's own path.
        nodes: names of the graph nodes, in execution order.
        layers: module paths of its layers, in execution order.
    """

    name: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]


def cut_positions(nodes: list[Node]) -> list[int]:
    """Return the positions after which only that position's value, a tensor, is still needed.

    Args:
        nodes: the network's nodes in execution order.
    """
    position = {node: i for i, node in enumerate(nodes)}
    cuts, far = [], -1
    for i, node in enumerate(nodes):
        constant = node.meta.get("scalar") or node.op == "get_attr"
        if far <= i and not constant and not is_tuple(node) and is_batch_first(node):
            cuts.append(i)
        if constant:
            continue  # constants and sizes are recomputed wherever they are needed
        far = max([far, *(position[user] for user in node.users if user in position)])
    return cuts


def is_tuple(node: Node) -> bool:
    """Whether a node's value is several tensors, as those of split and chunk are."""
    return any(user.target is operator.getitem for user in node.users)


def find_units(network: GraphModule) -> list[Unit]:
    """Split ``network`` into reconstruction units (ptq notes, section 10).

    Pieces between cut points; light pieces (no layer) join the piece before them, so that a unit
    starts with a layer and ends after its activation; chains of single-layer pieces that make up
    one module are merged (inverted residuals without a skip). All calls of a layer that is used
    more than once are in one unit: it can be tuned only once.

    Returns:
        Units in execution order; running them one after the other is running the network.
    """
    nodes = [n for n in network.graph.nodes if n.op != "output"]
    pieces = _join_reused(network, _pieces(network, nodes))
    pieces = _merge_chains(network, pieces)
    return [unit_of(network, [n for n in piece if n.op != "placeholder"]) for piece in pieces]


def _pieces(network: GraphModule, nodes: list[Node]) -> list[list[Node]]:
    pieces: list[list[Node]] = []
    start = 0
    leading: list[Node] = []
    ends = [cut for cut in cut_positions(nodes) if cut != len(nodes) - 1] + [len(nodes) - 1]
    for cut in ends:
        piece, start = nodes[start : cut + 1], cut + 1
        if not piece:
            continue
        if _layers(network, piece):
            pieces.append([*leading, *piece])
            leading = []
        elif pieces:
            pieces[-1].extend(piece)
        else:
            leading = [*leading, *piece]
    return pieces


def _layers(network: GraphModule, piece: list[Node]) -> list[Node]:
    return [n for n in piece if isinstance(module_of(network, n), Layer)]


def _join_reused(network: GraphModule, pieces: list[list[Node]]) -> list[list[Node]]:
    """Join the pieces from the first to the last that call the same layer."""
    last = {str(n.target): i for i, piece in enumerate(pieces) for n in _layers(network, piece)}
    joined: list[list[Node]] = []
    until = -1
    for i, piece in enumerate(pieces):
        if i <= until:
            joined[-1].extend(piece)
        else:
            joined.append(piece)
        until = max([until, *(last[str(n.target)] for n in _layers(network, piece))])
    return joined


def _merge_chains(network: GraphModule, pieces: list[list[Node]]) -> list[list[Node]]:
    """Merge runs of single-layer pieces that are all the layers of one module, smallest first."""
    everything = [str(n.target) for piece in pieces for n in _layers(network, piece)]
    merged: list[list[Node]] = []
    i = 0
    while i < len(pieces):
        length = _chain_length(network, pieces[i:], everything)
        merged.append([n for piece in pieces[i : i + length] for n in piece])
        i += length
    return merged


def _chain_length(network: GraphModule, pieces: list[list[Node]], everything: list[str]) -> int:
    run: list[str] = []
    for length, piece in enumerate(pieces[:MAX_CHAIN], start=1):
        layers = _layers(network, piece)
        if len(layers) != 1:
            return 1
        run.append(str(layers[0].target))
        if length == 1:
            continue
        scope = common_scope(run)
        if scope and [path for path in everything if path.startswith(scope + ".")] == run:
            return length
    return 1


def common_scope(paths: list[str]) -> str:
    """Return the innermost module path that holds all ``paths`` ("" for the root).

    Example:
        >>> common_scope(["stage1.unit1.conv1", "stage1.unit1.conv2"])
        'stage1.unit1'
    """
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def unit_of(network: GraphModule, piece: list[Node]) -> Unit:
    """Return the unit of these nodes, named after the module that holds its layers."""
    layers = list(dict.fromkeys(str(n.target) for n in _layers(network, piece)))
    name = layers[0] if len(layers) == 1 else common_scope(layers) or " + ".join(layers[:2])
    return Unit(name, tuple(n.name for n in piece), tuple(layers))
