# SPDX-License-Identifier: Apache-2.0
"""Block outputs found on the graph, and networks that return inner tensors."""

import pytest
import torch
from helpers.families import FAMILIES, read
from helpers.networks import Inverted, Net, Residual, conv, images, network_of

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
