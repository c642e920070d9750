# SPDX-License-Identifier: Apache-2.0
"""What is reconstructed at a time: pairs of a teacher's piece and the student's piece for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule, Node

from zsq.errors import UsageError
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import CLAMPS, layer_nodes
from zsq.student import Student
from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, operator_name
from zsq.teacher.pieces import cut_piece
from zsq.teacher.regions import find_regions
from zsq.teacher.shapes import is_batch_first
from zsq.teacher.units import MAX_LAYERS, Unit, find_units


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
        parts: of a piece of too many layers to be tuned at once, each cut out of this piece, in an order
            in which each reads only what those before compute; else empty.
    """

    name: str
    source: str
    output: str
    teacher: GraphModule
    student: GraphModule
    layers: tuple[str, ...]
    quantizers: tuple[str, ...]
    parts: tuple[Piece, ...] = ()


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
        Pieces in execution order; each reads what the one before computes. Those of more than
        `MAX_LAYERS` layers have parts.
    """
    pieces = _each_quantizer_once(_pieces_of(network, student.network, find_units(network)))
    return [
        replace(piece, parts=_parts(piece)) if len(piece.layers) > MAX_LAYERS else piece
        for piece in pieces
    ]


def _in_batches(network: GraphModule, pieces: Iterable[Piece]) -> bool:
    """Whether what pieces read and put out has images on its first axis."""
    ends = {name for piece in pieces for name in (piece.source, piece.output)}
    return all(is_batch_first(node) for node in network.graph.nodes if node.name in ends)


def tuned_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Return what is tuned at a time: parts instead of the pieces that have them."""
    return [each for piece in pieces for each in piece.parts or (piece,)]


def _parts(piece: Piece) -> tuple[Piece, ...]:
    """Split a piece into the blocks inside it and the single layers between them."""
    regions = find_regions(piece.teacher, MAX_LAYERS)
    held = {path for region in regions for path in region.layers}
    singles = [
        single
        for single in _single_layers(piece.teacher, piece.student)
        if single.layers[0] not in held
    ]
    place = {node.name: i for i, node in enumerate(piece.teacher.graph.nodes)}
    found = [*_pieces_of(piece.teacher, piece.student, regions), *singles]
    if not _in_batches(piece.teacher, found):
        return ()  # sequences first: one piece, however large
    return tuple(_each_quantizer_once(sorted(found, key=lambda part: place[part.source])))


def _pieces_of(network: GraphModule, student: GraphModule, units: Sequence[Unit]) -> list[Piece]:
    pieces = []
    for unit in units:
        output = unit.nodes[-1]
        own = _quantizers_read_by(student, set(unit.nodes))
        teacher = cut_piece(network, unit.nodes, output)
        part = cut_piece(student, [*unit.nodes, *(n.name for n in own)], output)
        names = tuple(dict.fromkeys(str(n.target).removeprefix("quantizers.") for n in own))
        source = next(n.name for n in teacher.graph.nodes if n.op == "placeholder")
        pieces.append(Piece(unit.name, source, output, teacher, part, unit.layers, names))
    return pieces


def _each_quantizer_once(pieces: Iterable[Piece]) -> list[Piece]:
    """Leave every quantizer to the first piece that has it."""
    done: set[str] = set()
    found = []
    for piece in pieces:
        found.append(replace(piece, quantizers=tuple(q for q in piece.quantizers if q not in done)))
        done |= set(piece.quantizers)
    return found


def _quantizers_read_by(student: GraphModule, readers: set[str]) -> list[Node]:
    """Return the quantizer nodes whose results are read by any of these nodes."""
    return [
        node
        for node in student.graph.nodes
        if node.op == "call_module"
        and str(node.target).startswith("quantizers.")
        and any(reader.name in readers for reader in _real_readers(node))
    ]


def _real_readers(node: Node) -> list[Node]:
    """Readers of a quantizer's result, looking through quantizers that repeat it."""
    readers: list[Node] = []
    for reader in node.users:
        repeated = reader.op == "call_module" and str(reader.target).startswith("quantizers.")
        readers.extend(_real_readers(reader) if repeated else [reader])
    return readers


def layer_pieces(network: GraphModule, student: GraphModule) -> list[Piece]:
    """Split teacher's and student's graphs into single layers (AdaRound, arXiv 2004.10568).

    A piece is a layer with the quantizer on its input and, where nothing else reads in between, the
    batch norm and the clipping activation behind it.

    Raises:
        UsageError: a layer reads or puts out a tensor whose first axis does not count images.
    """
    check_single_layers(network)
    return _each_quantizer_once(_single_layers(network, student))


def check_single_layers(network: GraphModule, setting: str = "tuning.unit") -> None:
    """Refuse to tune layers one by one in a network where that cannot be done in batches.

    Args:
        network: the float network.
        setting: that says what is tuned at a time.

    Raises:
        UsageError: a layer reads or puts out a tensor whose first axis does not count images.
    """
    # a shared layer is tuned where it is called first
    first = {str(layer.target): layer for layer in reversed(layer_nodes(network))}
    for path, layer in first.items():
        if not all(map(is_batch_first, (*tensor_inputs(layer), layer))):
            raise UsageError(
                f"the layer {path!r} reads or puts out tensors whose first axis does not count images (sequences "
                "first, as inside of nn.MultiheadAttention), so layers of this network cannot be tuned one by one "
                f"in batches; add --set {setting}=block."
            )


def _single_layers(network: GraphModule, student: GraphModule) -> list[Piece]:
    names = {n.name: n for n in student.graph.nodes}
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
        part = cut_piece(student, [*(n.name for n in nodes), *(n.name for n in own)], output)
        inside = {source.name, *(n.name for n in nodes)}  # else its tensor lies behind a pooling
        quantizers = [str(n.target).removeprefix("quantizers.") for n in own]
        quantizers = [name for name in quantizers if name in inside]
        mine, path = tuple(dict.fromkeys(quantizers)), str(layer.target)
        done.add(path)
        pieces.append(Piece(path, source.name, output, teacher, part, (path,), mine))
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
