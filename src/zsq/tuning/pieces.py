# SPDX-License-Identifier: Apache-2.0
"""What is reconstructed at a time: pairs of a teacher's piece and the student's piece for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import CLAMPS, layer_nodes
from zsq.student import Student
from zsq.teacher.fold import module_of
from zsq.teacher.layers import BatchNorm, operator_name
from zsq.teacher.pieces import cut_piece
from zsq.teacher.units import find_units


@dataclass(frozen=True)
class Piece:
    """One reconstruction problem.

    Attributes:
        name: for people.
        source: name of the node whose value the piece reads.
        output: name of the node whose value it computes.
        teacher: the float piece.
        student: the quantized piece; shares its modules with the student.
        layers: paths of its layers.
        quantizers: names of the activation quantizers that are tuned with this piece.
    """

    name: str
    source: str
    output: str
    teacher: GraphModule
    student: GraphModule
    layers: tuple[str, ...]
    quantizers: tuple[str, ...]


def quantizer_modules(piece: Piece) -> dict[str, ActivationQuantizer]:
    """Return the piece's own quantizers by the name of the node they quantize."""
    found = {}
    for name in piece.quantizers:
        module = piece.student.get_submodule(f"quantizers.{name}")
        assert isinstance(module, ActivationQuantizer)
        found[name] = module
    return found


def layer_modules(piece: Piece) -> dict[str, QuantizedLayer]:
    """Return the piece's layers by path."""
    found = {}
    for path in piece.layers:
        module = piece.student.get_submodule(path)
        assert isinstance(module, QuantizedLayer)
        found[path] = module
    return found


def block_pieces(network: GraphModule, student: Student) -> list[Piece]:
    """Split teacher and student into the blocks that the graph yields.

    Args:
        network: the float network that the student was made from.
        student: not changed.

    Returns:
        Pieces in execution order; each reads what the one before computes.
    """
    units = find_units(network)
    groups = [set(unit.nodes) for unit in units]
    owner = {name: i for i, group in enumerate(groups) for name in group}
    quantizers = _quantizers_by_reader(student, owner)
    pieces = []
    done: set[str] = set()
    for i, unit in enumerate(units):
        output = unit.nodes[-1]
        own = quantizers.get(i, [])
        teacher = cut_piece(network, unit.nodes, output)
        nodes = [*unit.nodes, *(n.name for n in own)]
        part = cut_piece(student.network, nodes, output)
        names = tuple(dict.fromkeys(str(n.target).removeprefix("quantizers.") for n in own))
        names = tuple(n for n in names if n not in done)
        done |= set(names)
        source = next(n.name for n in teacher.graph.nodes if n.op == "placeholder")
        pieces.append(Piece(unit.name, source, output, teacher, part, unit.layers, names))
    return pieces


def _quantizers_by_reader(student: Student, owner: dict[str, int]) -> dict[int, list[Node]]:
    """Group quantizer nodes by the unit that reads their result first."""
    found: dict[int, list[Node]] = {}
    for node in student.network.graph.nodes:
        if node.op != "call_module" or not str(node.target).startswith("quantizers."):
            continue
        readers = [owner[r.name] for r in _real_readers(node) if r.name in owner]
        if readers:
            found.setdefault(min(readers), []).append(node)
    return found


def _real_readers(node: Node) -> list[Node]:
    """Readers of a quantizer's result, looking through quantizers that repeat it."""
    readers: list[Node] = []
    for reader in node.users:
        repeated = reader.op == "call_module" and str(reader.target).startswith("quantizers.")
        readers.extend(_real_readers(reader) if repeated else [reader])
    return readers


def layer_pieces(network: GraphModule, student: Student) -> list[Piece]:
    """Split teacher and student into single layers (AdaRound, arXiv 2004.10568).

    A piece is a layer with the quantizer on its input and, where nothing else reads in between, the
    batch norm and the clipping activation behind it.
    """
    names = {n.name: n for n in student.network.graph.nodes}
    pieces: list[Piece] = []
    done: set[str] = set()
    for layer in layer_nodes(network):
        if str(layer.target) in done:
            continue
        nodes = _tail(network, layer)
        output = nodes[-1].name
        teacher = cut_piece(network, [n.name for n in nodes], output)
        own = []
        entry = names[layer.name].args[0]
        while isinstance(entry, Node) and str(entry.target).startswith("quantizers."):
            own.append(entry)
            entry = entry.args[0]
        source = layer.args[0]
        assert isinstance(source, Node)
        part = cut_piece(
            student.network, [*(n.name for n in nodes), *(n.name for n in own)], output
        )
        inside = {source.name, *(n.name for n in nodes)}  # else its tensor lies behind a pooling
        quantizers = [str(n.target).removeprefix("quantizers.") for n in own]
        quantizers = [name for name in quantizers if name in inside]
        mine = tuple(q for q in dict.fromkeys(quantizers) if q not in done)
        done |= {str(layer.target), *mine}
        pieces.append(
            Piece(str(layer.target), source.name, output, teacher, part, (str(layer.target),), mine)
        )
    return pieces


def _tail(network: GraphModule, layer: Node) -> list[Node]:
    nodes = [layer]
    while len(nodes[-1].users) == 1:
        reader = next(iter(nodes[-1].users))
        module: nn.Module | None = module_of(network, reader)
        if not isinstance(module, BatchNorm) and operator_name(reader.target) not in CLAMPS:
            break
        nodes.append(reader)
    return nodes
