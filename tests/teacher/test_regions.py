# SPDX-License-Identifier: Apache-2.0
"""Blocks inside units that are too large, against what removing a node does to a graph."""

import pytest
import torch
from helpers.families import build
from helpers.networks import Net, Parallel, conv, network_of
from helpers.students import values
from hypothesis import given
from hypothesis import strategies as st

from zsq.teacher.pieces import cut_piece
from zsq.teacher.regions import DominatorTree, count_parts, find_regions
from zsq.teacher.teacher import load_teacher
from zsq.teacher.units import find_units


@st.composite
def graphs(draw):
    """Sources of each node of an acyclic graph; node 0 is the root, others may be out of its reach."""
    count = draw(st.integers(1, 9))
    return [
        draw(st.lists(st.integers(0, node - 1), unique=True, max_size=3)) if node else []
        for node in range(count)
    ]


def reachable(sources, without=None):
    """Return the nodes that a way from node 0 leads to when one node is taken away."""
    found = set() if without == 0 else {0}
    for node in range(1, len(sources)):
        if node != without and found & set(sources[node]):
            found.add(node)
    return found


@given(graphs())
def test_a_node_holds_another_if_there_is_no_way_without_it(sources):
    tree = DominatorTree(list(range(len(sources))), lambda node: sources[node])
    everything = reachable(sources)
    for a in range(len(sources)):
        beyond = everything - reachable(sources, without=a)
        for b in range(len(sources)):
            assert tree.holds(a, b) == (a in everything and b in beyond), (a, b)


def test_residual_blocks_of_parallel_branches_are_found():
    network = network_of(Parallel())
    stem, body, head = find_units(network)
    assert len(body.layers) == 18
    piece = cut_piece(network, body.nodes, body.nodes[-1])
    found = find_regions(piece, 16)
    assert [region.layers for region in found] == [
        (f"{branch}.{first}", f"{branch}.{second}")
        for branch, first, second in (
            ("one", "a", "b"), ("one", "c", "d"), ("two", "a", "b"), ("two", "c", "d"),
            ("three", "a", "b"), ("three", "c", "d"), ("four", "a", "b"), ("four", "c", "d"),
        )
    ]  # fmt: skip
    assert all(region.nodes[-1].startswith("relu") for region in found), "the ReLU belongs to them"
    assert count_parts(network, body) == 8 + 2
    assert count_parts(network, stem) == count_parts(network, head) == 1


def test_blocks_are_the_outermost_that_are_small_enough():
    net = Net(
        lambda n, x: _nested(n, n.stem(x)), stem=conv(), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4)
    )
    network = network_of(net)
    piece = cut_piece(network, find_units(network)[1].nodes, find_units(network)[1].nodes[-1])
    assert [r.layers for r in find_regions(piece, 3)] == [("a", "b", "c")]
    assert [r.layers for r in find_regions(piece, 2)] == [("b", "c")]
    assert find_regions(piece, 1) == []


def _nested(n, x):
    y = n.a(x).relu()
    z = y + n.c(n.b(y).relu())
    return x + z.relu()


def test_a_layer_that_is_called_elsewhere_too_is_in_no_block():
    def twice(n, x):
        x = n.stem(x)
        inner = x + n.b(n.a(x).relu())
        return x * n.c(n.a(inner))

    net = Net(twice, stem=conv(), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4))
    network = network_of(net)
    unit = find_units(network)[1]
    piece = cut_piece(network, unit.nodes, unit.nodes[-1])
    assert find_regions(piece, 2) == []
    assert [r.layers for r in find_regions(piece, 3)] == [("a", "b", "c")]


NONE_FOUND = [("shufflenetv2", 2), ("shufflenetv2", 3), ("bninception", 2), ("bninception", 3)]


@pytest.mark.parametrize("most", [2, 3, 8])
@pytest.mark.parametrize(
    "family", ["resnet", "densenet", "shufflenetv2", "mobilenetv3", "bninception"]
)
def test_blocks_read_one_tensor_and_compute_what_the_network_computes(family, most):
    module, shape = build(family)
    network = load_teacher(module, input_shape=shape).network
    x = torch.randn(2, *shape)
    everything = cut_piece(network, [n.name for n in network.graph.nodes if n.op != "output"],
                           [n.name for n in network.graph.nodes][-2])  # fmt: skip
    seen, taken = values(network, x), []
    for region in find_regions(everything, most):
        assert 2 <= len(region.layers) <= most
        taken += region.layers
        piece = cut_piece(network, region.nodes, region.nodes[-1])
        (source,) = [n.name for n in piece.graph.nodes if n.op == "placeholder"]
        assert torch.equal(piece(seen[source]), seen[region.nodes[-1]])
    assert len(taken) == len(set(taken))
    assert taken or (family, most) in NONE_FOUND
