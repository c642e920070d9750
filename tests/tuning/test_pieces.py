# SPDX-License-Identifier: Apache-2.0
from functools import cache
from itertools import pairwise

import pytest
import torch
from helpers.families import build
from helpers.networks import (
    Concat,
    Inverted,
    Net,
    Parallel,
    Residual,
    SqueezeExcite,
    conv,
    randomise,
)
from helpers.oddities import NETS
from helpers.students import SHAPE, recipe, teacher_of, values

from zsq.quantizers.layers import QuantizedLayer
from zsq.student import attach, calibrate_student, prepared_network
from zsq.teacher.pieces import nodes_up_to
from zsq.teacher.teacher import load_teacher
from zsq.tuning import pieces as module
from zsq.tuning.pieces import (
    block_pieces,
    layer_modules,
    layer_pieces,
    quantizer_modules,
    tuned_pieces,
)

PROTOCOLS = ["edges-8bit", "integer", "all-low-bit"]


@cache
def teacher(name):
    torch.manual_seed(0)
    if isinstance(name, type):
        return teacher_of(name)
    module, shape = build(name) if name not in NETS else (randomise(NETS[name]()), SHAPE)
    return load_teacher(module, input_shape=shape)


def make(name, protocol="edges-8bit", *settings):
    """Return the float network, a calibrated student of it, and images."""
    own = teacher(name)
    chosen = recipe(*settings, protocol=protocol, bits="w4a4")
    student = attach(own, chosen)
    x = torch.randn(4, *own.info.input_shape, generator=torch.Generator().manual_seed(3))
    calibrate_student(student, x)
    return prepared_network(own, chosen), student, x


NAMES = [Residual, Inverted, Concat, SqueezeExcite, "mobilenetv3", "densenet", "shufflenetv2"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_chain_to_both_networks_and_share_everything_out(name, protocol):
    network, student, x = make(name, protocol)
    pieces = block_pieces(network, student)
    float_side = quantized_side = x
    with torch.no_grad():
        for piece in pieces:
            float_side, quantized_side = piece.teacher(float_side), piece.student(quantized_side)
        assert torch.equal(float_side, network(x))
        assert torch.equal(quantized_side, student(x))
    layers = [path for piece in pieces for path in piece.layers]
    assert sorted(layers) == sorted(student.placement.weights)
    quantizers = [name for piece in pieces for name in piece.quantizers]
    assert sorted(quantizers) == sorted(student.placement.activations)


@pytest.mark.parametrize("name", ["reused convolution", "attention", "windows"])
def test_blocks_of_awkward_networks_chain_too(name):
    network, student, x = make(name, "integer")
    y = x
    with torch.no_grad():
        for piece in block_pieces(network, student):
            y = piece.student(y)
        assert torch.equal(y, student(x))


def test_a_blocks_input_quantizer_belongs_to_the_block():
    network, student, _ = make(Residual)
    stem, first, second, head = block_pieces(network, student)
    assert stem.quantizers == ()
    assert first.quantizers == ("relu_default", "relu_default_1")
    assert second.quantizers == ("relu_default_2", "relu_default_3")
    assert head.quantizers == ("mean_dim",)
    assert [p.source for p in (stem, first, second, head)] == [
        "x", "relu_default", "relu_default_2", "mean_dim",
    ]  # fmt: skip


def test_pieces_share_their_modules_with_the_student():
    network, student, _ = make(Residual)
    piece = block_pieces(network, student)[1]
    for path, layer in layer_modules(piece).items():
        assert isinstance(layer, QuantizedLayer)
        assert layer is student.network.get_submodule(path)
    for name, quantizer in quantizer_modules(piece).items():
        assert quantizer is student.quantizer(name)


def test_each_block_reads_what_the_one_before_gives():
    network, student, x = make(Residual)
    pieces = block_pieces(network, student)
    ours, theirs = values(network, x), values(student.network, x)
    assert pieces[-1].output == "fc"
    for before, piece in pairwise(pieces):
        assert piece.source == before.output
        assert torch.equal(piece.teacher(ours[piece.source]), ours[piece.output])
        assert torch.equal(piece.student(theirs[piece.source]), theirs[piece.output])


@pytest.mark.parametrize("protocol", ["edges-8bit", "all-low-bit"])
@pytest.mark.parametrize("name", [Residual, Inverted, Concat, "mobilenetv3"])
def test_single_layers_give_what_they_give_in_the_networks(name, protocol):
    network, student, x = make(name, protocol)
    pieces = layer_pieces(network, student.network)
    assert [p.layers for p in pieces] == [(path,) for path in student.placement.weights]
    ours, theirs = values(network, x), values(student.network, x)
    with torch.no_grad():
        for piece in pieces:
            assert torch.equal(piece.teacher(ours[piece.source]), ours[piece.output])
            assert torch.equal(piece.student(theirs[piece.source]), theirs[piece.output])
    quantizers = [name for piece in pieces for name in piece.quantizers]
    assert len(set(quantizers)) == len(quantizers)


def test_a_single_layer_comes_with_its_norm_and_its_clipping_activation():
    network, student, _ = make(Residual, "edges-8bit", "fold_batch_norm=false")
    pieces = {p.name: p for p in layer_pieces(network, student.network)}
    assert pieces["a1"].output == "relu_default_1"
    assert pieces["a2"].output == "a2_bn", "an addition follows"
    assert pieces["fc"].output == "fc"
    assert pieces["a1"].quantizers == ("relu_default",)
    assert pieces["proj"].quantizers == (), "it reads the same tensor as a1"


def test_a_layer_called_twice_is_one_piece():
    net = Net(lambda n, x: n.b(n.b(n.a(x)).relu()).relu(), a=conv(), b=conv(4, 4))
    own = load_teacher(randomise(net), input_shape=SHAPE)
    student = attach(own, recipe())
    names = [p.name for p in layer_pieces(prepared_network(own, recipe()), student.network)]
    assert names == ["a", "b", "fc"]


def test_quantizers_of_single_layers_can_be_calibrated_in_their_piece():
    network, student, _ = make(Inverted, "integer")
    for piece in layer_pieces(network, student.network):
        names = {n.name for n in piece.student.graph.nodes}
        assert set(piece.quantizers) <= names, piece.name


# --- pieces of too many layers -------------------------------------------------------------------


def test_a_piece_of_parallel_branches_has_their_blocks_as_parts():
    network, student, _ = make(Parallel)
    stem, body, head = block_pieces(network, student)
    assert (stem.parts, head.parts) == ((), ())
    assert [part.layers for part in body.parts if len(part.layers) == 1] == [("down",), ("over",)]
    assert len(body.parts) == 10
    assert tuned_pieces([stem, body, head]) == [stem, *body.parts, head]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [*NAMES, Parallel, "reused convolution", "attention"])
def test_parts_give_what_they_give_in_the_networks_and_share_everything_out(
    monkeypatch, name, protocol, most
):
    monkeypatch.setattr(module, "MAX_LAYERS", most)
    network, student, x = make(name, protocol)
    pieces = block_pieces(network, student)
    parts = tuned_pieces(pieces)
    layers = [path for part in parts for path in part.layers]
    assert sorted(layers) == sorted(student.placement.weights)
    if name != "attention":  # inside of which sequences come first
        assert max(len(part.layers) for part in parts) <= max(most, 1)
    names = [quantizer for part in parts for quantizer in part.quantizers]
    assert len(set(names)) == len(names)
    ours, theirs = values(network, x), values(student.network, x)
    with torch.no_grad():
        for part in parts:
            assert torch.equal(part.teacher(ours[part.source]), ours[part.output]), part.name
            assert torch.equal(part.student(theirs[part.source]), theirs[part.output]), part.name
            assert set(part.quantizers) <= {n.name for n in part.student.graph.nodes}, part.name


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [Parallel, Residual, "mobilenetv3", "shufflenetv2"])
def test_a_part_reads_only_what_those_before_it_compute(monkeypatch, name, protocol):
    monkeypatch.setattr(module, "MAX_LAYERS", 2)
    network, student, _ = make(name, protocol)
    for piece in block_pieces(network, student):
        tuned: set[str] = set()
        for part in piece.parts:
            needed = nodes_up_to(piece.teacher, part.source)
            called = {str(n.target) for n in piece.teacher.graph.nodes if n.name in needed}
            assert called & set(piece.layers) <= tuned, part.name
            tuned |= set(part.layers)
