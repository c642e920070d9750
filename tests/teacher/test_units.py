# SPDX-License-Identifier: Apache-2.0
import operator

import pytest
import torch
from helpers.families import read
from helpers.networks import Concat, Inverted, Net, Residual, SqueezeExcite, conv, network_of
from torch import nn

from zsq.teacher.fold import fold_batch_norms
from zsq.teacher.pieces import cut_piece
from zsq.teacher.units import common_scope, cut_positions, find_units


def layers_of_units(module, folded=True):
    network = network_of(module)
    return [list(u.layers) for u in find_units(fold_batch_norms(network) if folded else network)]


def brute_force_cuts(nodes):
    """A position is a cut when nothing before it is read after it, checked pair by pair."""
    nodes = list(nodes)
    constant = [n.op == "get_attr" or bool(n.meta.get("scalar")) for n in nodes]
    cuts = []
    for p, node in enumerate(nodes):
        crossing = any(
            reader in nodes[p + 1 :]
            for before, skip in zip(nodes[:p], constant[:p], strict=True)
            if not skip
            for reader in before.users
        )
        several = any(reader.target is operator.getitem for reader in node.users)
        if not crossing and not constant[p] and not several:
            cuts.append(p)
    return cuts


@pytest.mark.parametrize("make", [Residual, Inverted, Concat, SqueezeExcite])
def test_cut_positions_are_those_of_the_definition(make):
    nodes = [n for n in network_of(make()).graph.nodes if n.op != "output"]
    assert cut_positions(nodes) == brute_force_cuts(nodes)


@pytest.mark.parametrize("family", ["densenet", "shufflenetv2", "dpn", "ghostnet"])
def test_cut_positions_of_branching_families(family):
    nodes = [n for n in read(family)[1].graph.nodes if n.op != "output"]
    assert cut_positions(nodes) == brute_force_cuts(nodes)


@pytest.mark.parametrize("folded", [False, True])
def test_residual_blocks_are_units(folded):
    assert layers_of_units(Residual(), folded) == [
        ["stem"], ["a1", "a2", "proj"], ["b1", "b2"], ["fc"],
    ]  # fmt: skip


def test_inverted_residuals_are_units():
    assert layers_of_units(Inverted()) == [["stem"], ["exp", "dw", "pw"], ["last"], ["fc"]]


def test_branches_and_gates_have_no_cut_inside():
    assert layers_of_units(Concat()) == [["stem"], ["squeeze"], ["left", "right"], ["last"], ["fc"]]
    assert layers_of_units(SqueezeExcite()) == [["stem"], ["body"], ["down", "up"], ["fc"]]


def test_a_unit_ends_after_its_activation_and_pooling():
    network = network_of(Concat())
    assert find_units(network)[0].nodes == ("stem", "relu_default", "max_pool2d_default")


def block(count):
    return nn.Sequential(*(part for _ in range(count) for part in (conv(4, 4), nn.ReLU())))


@pytest.mark.parametrize(("count", "merged"), [(1, True), (2, True), (4, True), (5, False)])
def test_chains_of_up_to_four_layers_of_one_module_are_one_unit(count, merged):
    net = Net(lambda n, x: n.block(n.stem(x)), stem=conv(), block=block(count))
    units = layers_of_units(net)
    paths = [f"block.{2 * i}" for i in range(count)]
    assert units == [["stem"], *([paths] if merged else [[p] for p in paths]), ["fc"]]


def test_the_smallest_module_wins():
    both = nn.Sequential(block(2), block(2))
    units = layers_of_units(Net(lambda n, x: n.both(n.stem(x)), stem=conv(), both=both))
    assert units == [["stem"], ["both.0.0", "both.0.2"], ["both.1.0", "both.1.2"], ["fc"]]


def test_a_module_that_is_only_partly_a_chain_is_not_merged():
    net = Net(
        lambda n, x: n.block[4](n.block[2](n.other(n.block[0](n.stem(x))))),
        stem=conv(), other=conv(4, 4), block=block(3),
    )  # fmt: skip
    assert layers_of_units(net) == [
        ["stem"], ["block.0"], ["other"], ["block.2"], ["block.4"], ["fc"],
    ]  # fmt: skip


def test_all_calls_of_a_layer_are_in_one_unit():
    net = Net(
        lambda n, x: n.c(n.a(n.b(n.a(n.stem(x)).relu()).relu()).relu()),
        stem=conv(), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4),
    )  # fmt: skip
    assert layers_of_units(net) == [["stem"], ["a", "b"], ["c"], ["fc"]]


def test_what_precedes_the_first_layer_joins_its_unit():
    net = Net(lambda n, x: n.c(n.bn(x.relu())), bn=nn.BatchNorm2d(3), c=conv())
    units = find_units(network_of(net))
    assert units[0].nodes == ("relu_default", "bn", "c", "mean_dim")


def test_a_tuple_never_leaves_a_unit():
    def split(net, x):
        a, b = net.stem(x).relu().chunk(2, 1)
        return torch.cat([a, net.c(b)], 1)

    units = find_units(network_of(Net(split, stem=conv(), c=conv(2, 2))))
    assert [unit.layers for unit in units] == [("stem",), ("c",), ("fc",)]
    assert "chunk_default" in units[1].nodes


#: Counted by hand from the arguments in `FAMILIES` and the papers' blocks.
SMALL = {
    "preresnet": [1, 3, 4, 1],
    "resnext": [1, 4, 4, 1],
    "seresnet": [1, 4, 5, 1],  # two layers of the gate each, a projection in the second
    "regnet": [1, 6, 6, 5, 1],
    "wrn_cifar": [1, 2, 3, 2, 1],
    "vgg": [2, 2, 3],
    "nin_cifar": [2, 2, 2, 1],
    "densenet": [1, 2, 2, 1, 2, 2, 1],
    "xdensenet_cifar": [1, 2, 2, 1, 2, 2, 1],
    "shufflenet": [1, 3, 3, 3, 3, 1],
    "shufflenetv2": [1, 5, 3, 5, 3, 1, 1],  # a down-sampling unit has two more on its shortcut
}


@pytest.mark.parametrize("family", SMALL)
def test_layers_per_unit(family):
    units = find_units(read(family)[1])
    assert [len(unit.layers) for unit in units] == SMALL[family]


@pytest.mark.parametrize(
    ("paths", "scope"),
    [
        (["a.b.c", "a.b.d"], "a.b"),
        (["a.b", "a.bc"], "a"),
        (["a", "b"], ""),
        (["a.b"], "a.b"),
        (["a.b", "a.b.c"], "a.b"),
        ([], ""),
    ],
)
def test_common_scope(paths, scope):
    assert common_scope(paths) == scope


def test_a_constant_repeated_for_every_image_does_not_reach_back_to_the_networks_input():
    """A sampling grid of a fixed transformation: its batch size is read inside the unit that uses it."""

    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            y = self.b(self.a(x).relu()).relu()
            turn = torch.eye(2, 3)[None].expand(y.shape[0], 2, 3)
            grid = nn.functional.affine_grid(turn, y.shape, align_corners=False)
            return self.fc(nn.functional.grid_sample(y, grid, align_corners=False).mean((2, 3)))

    net = Sampled().eval()
    network = network_of(net)
    value = x = torch.randn(3, 3, 8, 8)
    for unit in find_units(network):
        value = cut_piece(network, unit.nodes, unit.nodes[-1])(value)
    assert len(find_units(network)) == 3
    assert torch.allclose(value, net(x), atol=1e-6)
