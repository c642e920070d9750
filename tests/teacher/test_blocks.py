# SPDX-License-Identifier: Apache-2.0
"""Block outputs found on the graph, and networks that return inner tensors."""

import pytest
import torch
from helpers.families import FAMILIES, read
from helpers.networks import Inverted, Net, Residual, SqueezeExcite, conv, images, network_of
from torch import nn
from torch.nn import functional

from zsq.teacher.blocks import block_outputs, tap_nodes
from zsq.teacher.units import find_units


def targets(network, names):
    nodes = {node.name: node for node in network.graph.nodes}
    return [str(nodes[name].target) for name in names]


def test_residual_branches_are_taken_before_the_addition():
    """Of the first block the branch of two layers, not the projection."""
    network = network_of(Residual())
    assert targets(network, block_outputs(network, (3, 8, 8))) == ["a2_bn", "b2_bn"]


def test_inverted_residuals_end_at_the_linear_bottleneck():
    network = network_of(Inverted())
    assert targets(network, block_outputs(network, (3, 8, 8)))[0] == "pw_bn"


def test_a_plain_network_has_its_layers():
    network = network_of(Net(lambda n, x: n.b(n.a(x).relu()).relu(), a=conv(), b=conv(4, 4)))
    assert targets(network, block_outputs(network, (3, 8, 8))) == ["a", "b"]


def test_mobilenets_of_the_zoo_give_what_hast_takes():
    """MobileNetV2: bottleneck outputs before the addition; ResNet: the body's last batch norm."""
    _, network, x = read("mobilenetv2")
    found = targets(network, block_outputs(network, tuple(x.shape[1:])))
    assert all(path.endswith("conv3.bn") for path in found)
    assert len(found) == 5
    _, network, x = read("resnet")
    found = targets(network, block_outputs(network, tuple(x.shape[1:])))
    assert all(path.endswith("body.conv2.bn") for path in found)
    assert len(found) == 3


class LastChannels(nn.Module):
    """A ConvNeXt block: linear layers on the last axis, a scale of each channel, a skip."""

    def __init__(self, width=4):
        super().__init__()
        self.stem, self.norm = conv(3, width), nn.BatchNorm2d(width)
        self.depthwise = conv(width, width, groups=width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gamma = nn.Parameter(torch.rand(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        inner = self.depthwise(x).permute(0, 2, 3, 1)
        inner = self.gamma * self.down(functional.gelu(self.up(inner)))
        x = x + inner.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def test_channels_are_found_on_the_last_axis():
    network = network_of(LastChannels(), (3, 8, 10))
    found = block_outputs(network, (3, 8, 10))
    assert targets(network, found) == ["down"]
    assert list(found.values()) == [3]
    assert tap_nodes(network, found)(torch.zeros(2, 3, 8, 10))[1].shape == (2, 8, 10, 4)


def test_a_gate_is_not_what_a_block_computed():
    """The gate's last layer has one value a channel; the map that it scales is the block's."""
    network = network_of(SqueezeExcite())
    maps = tap_nodes(network, block_outputs(network, (3, 8, 8)))(torch.zeros(1, 3, 8, 8))[1:]
    assert all(x.shape[2:].numel() > 1 for x in maps)


def test_single_convolutions_are_blocks_where_deeper_units_are_no_maps():
    """As in VGG, whose linear layers are one unit and whose convolutions are one each."""
    module = nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Flatten(),
        nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)),
    )  # fmt: skip
    network = network_of(module)
    assert any(len(unit.layers) > 1 for unit in find_units(network))
    assert targets(network, block_outputs(network, (3, 8, 8))) == ["0", "2"]


class Recurrent(nn.Module):
    """Rows of a map, read by an LSTM, whose results are several tensors."""

    def __init__(self):
        super().__init__()
        self.stem, self.lstm, self.head = (
            conv(3, 4),
            nn.LSTM(8, 5, batch_first=True),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        x = self.stem(x).relu().mean(1)
        return self.head(self.lstm(x)[0][:, -1])


def test_what_puts_out_several_tensors_is_no_block():
    assert block_outputs(network_of(Recurrent()), (3, 8, 8)) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_feature_maps_in_order(family):
    _, network, x = read(family)
    names = block_outputs(network, tuple(x.shape[1:]))
    assert names
    order = [n.name for n in network.graph.nodes]
    assert [order.index(n) for n in names] == sorted(order.index(n) for n in names)
    logits, *values = tap_nodes(network, names)(x)
    assert torch.equal(logits, network(x))
    assert all(v.ndim == 4 and len(v) == len(x) for v in values)
    assert len(names) <= len(find_units(network))


def test_taps_share_the_modules_and_leave_the_network_alone():
    network = network_of(Residual())
    code = network.code
    tapped = tap_nodes(network, ["a1"])
    assert tapped.get_submodule("a1") is network.get_submodule("a1")
    assert network.code == code
    _, value = tapped(images())
    stem = network.stem_bn(network.stem(images())).relu()
    assert torch.allclose(value, network.a1(stem), atol=1e-6)
