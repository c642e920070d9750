# SPDX-License-Identifier: Apache-2.0
"""Networks say the same in several ways; what is found in them does not depend on how."""

import pytest
import torch
from helpers.networks import Net, conv, images, network_of
from torch.nn import functional

from zsq.config import Bits
from zsq.quantizers.protocol import place
from zsq.teacher.layers import operator_name

RELU, BOUNDED = "aten.relu.default", "aten.hardtanh.default"
WAYS = {
    "clamp": (lambda x: x.clamp(min=0), RELU),
    "clamp_": (lambda x: x.clamp_(min=0), RELU),
    "clip": (lambda x: torch.clip(x, 0, None), RELU),
    "clamp_min": (lambda x: x.clamp_min(0.0), RELU),
    "threshold": (lambda x: functional.threshold(x, 0, 0), RELU),
    "bounded": (lambda x: x.clamp(0, 6), BOUNDED),
    "bounded by little": (lambda x: x.clamp(0, 0.25), BOUNDED),
}


@pytest.mark.parametrize("way", WAYS)
def test_activations_are_found_however_they_are_written(way):
    function, expected = WAYS[way]
    module = Net(lambda n, x: n.b(function(n.a(x))), a=conv(), b=conv(4, 4))
    network = network_of(module)
    x = 3 * images()
    assert torch.equal(network(x), module(x))
    assert expected in {operator_name(node.target) for node in network.graph.nodes}
    assert list(place(network, "all-low-bit", Bits.parse("w2a2")).activations.values()) == [2]


def norm_by_hand(n, x):
    x = torch.relu(n.a(x))
    centred = x - x.mean((2, 3), keepdim=True)
    variance = (centred**2).mean((2, 3), keepdim=True).clamp(min=0)
    return n.b(centred / (variance + 1e-5).sqrt())


@pytest.mark.parametrize("protocol", ["all-low-bit", "integer"])
def test_what_keeps_a_variance_from_falling_below_zero_is_no_activation(protocol):
    network = network_of(Net(norm_by_hand, a=conv(), b=conv(4, 4)))
    relus = [n.name for n in network.graph.nodes if operator_name(n.target) == RELU]
    assert len(relus) == 2
    assert relus[0] in place(network, protocol, Bits.parse("w8a8")).activations
    assert relus[1] not in place(network, protocol, Bits.parse("w8a8")).activations


def test_clamps_of_integers_and_empty_ones_stay_what_they_are():
    def forward(n, x):
        rows = torch.arange(4).clamp(min=0)
        return n.b(n.a(x)[:, rows].clamp(0, 0))

    network = network_of(Net(forward, a=conv(), b=conv(4, 4)))
    assert not place(network, "all-low-bit", Bits.parse("w2a2")).activations


@pytest.mark.parametrize("function", [
    lambda x: x.clamp(min=0.1), lambda x: x.clamp(max=0.5), lambda x: functional.threshold(x, 0.2, 0),
    lambda x: functional.threshold(x, 0, 1), lambda x: x.clamp(-1, 1), lambda x: torch.maximum(x, x.mean()),
])  # fmt: skip
def test_other_bounds_stay_what_they_are(function):
    module = Net(lambda n, x: n.b(function(n.a(x))), a=conv(), b=conv(4, 4))
    network = network_of(module)
    x = 3 * images()
    assert torch.equal(network(x), module(x))
    assert not place(network, "all-low-bit", Bits.parse("w2a2")).activations
