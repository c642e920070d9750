# SPDX-License-Identifier: Apache-2.0
"""Regions of a graph with one way in and one way out: blocks inside a unit that is too large to be one.

Networks of parallel branches (HRNet, NASNet) have no cut points for most of their depth, so most of
them is one unit. A branch of it may still hold residual blocks: between a value that everything in
the block depends on (a dominator) and one that everything in it leads to (a post-dominator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.fx import GraphModule, Node

from zsq.teacher.fold import calls, module_of, tensor_inputs
from zsq.teacher.layers import Layer
from zsq.teacher.pieces import cut_piece
from zsq.teacher.units import MAX_LAYERS, Unit, is_tuple, unit_of


class DominatorTree:
    """Which nodes lie on every way from the root of an acyclic graph to a node.

    Args:
        order: the graph's nodes, each after all of its sources; the first is the root.
        sources: of a node.
    """

    def __init__(self, order: Sequence[Node], sources: Callable[[Node], Iterable[Node]]) -> None:
        self.depth = {order[0]: 0}
        self.above: dict[Node, Node] = {}
        for node in order[1:]:
            reached = [source for source in sources(node) if source in self.depth]
            if not reached:
                continue
            common = reached[0]
            for other in reached[1:]:
                common = self._common(common, other)
            self.above[node] = common
            self.depth[node] = self.depth[common] + 1

    def _common(self, a: Node, b: Node) -> Node:
        while a is not b:
            if self.depth[a] < self.depth[b]:
                a, b = b, a
            a = self.above[a]
        return a

    def holds(self, a: Node, b: Node) -> bool:
        """Return whether ``a`` lies on every way to ``b``; it does on those to itself."""
        if a not in self.depth or b not in self.depth:
            return False
        while self.depth[b] > self.depth[a]:
            b = self.above[b]
        return a is b


def find_regions(piece: GraphModule, most: int) -> list[Unit]:
    """Find blocks inside a piece of a network.

    Args:
        piece: of one placeholder and one tensor as its output.
        most: layers of a block.

    Returns:
        Regions of 2 to ``most`` layers that do not overlap, in execution order, the outermost ones that
        are small enough. Layers in none of them, or called elsewhere too, are left out.
    """
    found: list[Unit] = []
    taken: set[str] = set()
    for unit in sorted(_candidates(piece), key=lambda unit: -len(unit.layers)):
        fits = 2 <= len(unit.layers) <= most and not taken & set(unit.layers)
        if fits and _called_within(piece, unit):
            found.append(unit)
            taken |= set(unit.layers)
    place = {node.name: i for i, node in enumerate(piece.graph.nodes)}
    return sorted(found, key=lambda unit: place[unit.nodes[0]])


def _candidates(piece: GraphModule) -> Iterator[Unit]:
    """Yield the regions that end where several values are joined; two are nested or disjoint."""
    nodes = [n for n in piece.graph.nodes if n.op != "get_attr" and not n.meta.get("scalar")]
    position = {node: i for i, node in enumerate(nodes)}
    before = DominatorTree(nodes, tensor_inputs)
    after = DominatorTree(nodes[::-1], lambda n: n.users)
    for end in nodes:
        if len(tensor_inputs(end)) < 2 or end.op == "output" or end not in before.above:
            continue
        entry = before.above[end]
        between = nodes[position[entry] + 1 : position[end] + 1]
        inside = [n for n in between if before.holds(entry, n) and after.holds(end, n)]
        read = {source for node in inside for source in tensor_inputs(node)}
        if read - set(inside) == {entry} and not is_tuple(entry) and not is_tuple(end):
            whole = [*inside, *_tail(piece, end)]
            if any(_is_layer(piece, node) for node in whole):
                yield unit_of(piece, whole)


def count_parts(network: GraphModule, unit: Unit) -> int:
    """Return in how many parts a unit is tuned: 1, or blocks and single layers where it is too large."""
    if len(unit.layers) <= MAX_LAYERS:
        return 1
    regions = find_regions(cut_piece(network, unit.nodes, unit.nodes[-1]), MAX_LAYERS)
    return len(regions) + len(unit.layers) - sum(len(region.layers) for region in regions)


def _called_within(network: GraphModule, unit: Unit) -> bool:
    """Return whether all calls of a unit's layers are in it: a layer can be tuned only once."""
    made = calls(network)
    return all(node.name in unit.nodes for path in unit.layers for node in made[path])


def _is_layer(network: GraphModule, node: Node) -> bool:
    return isinstance(module_of(network, node), Layer)


def _tail(network: GraphModule, node: Node) -> list[Node]:
    """Return what follows a node and is no layer, as long as it has one reader and reads nothing else."""
    tail: list[Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        light = node.op != "output" and not _is_layer(network, node) and not is_tuple(node)
        if not light or len(tensor_inputs(node)) > 1:
            break
        tail.append(node)
    return tail
