# SPDX-License-Identifier: Apache-2.0
"""Swing convolution on a whole network, against loops over pixels."""

import itertools

import pytest
import torch
from helpers.families import read
from helpers.networks import Net, Residual, conv, images, network_of
from torch import nn

from zsq.teacher.taps import strided_nodes, tap_batch_norms


def reflect(i, length):
    if i < 0:
        return -i
    return 2 * (length - 1) - i if i >= length else i


def swung(x, offset):
    """Read every pixel one row up or down, one column left or right; the edges reflect."""
    dy, dx = (int(d) - 1 for d in offset)
    h, w = x.shape[2:]
    y = torch.empty_like(x)
    for i, j in itertools.product(range(h), range(w)):
        y[:, :, i, j] = x[:, :, reflect(i + dy, h), reflect(j + dx, w)]
    return y


def inputs_by_hand(net, x, offsets):
    """The inputs of the residual network's batch norms, convolutions of stride 2 swung."""
    seen = []

    def norm(part, value):
        seen.append(value)
        return part(value)

    x = norm(net.stem_bn, net.stem(x)).relu()
    y = norm(net.a1_bn, net.a1(swung(x, offsets[0]))).relu()
    y = norm(net.a2_bn, net.a2(y))
    x = (y + norm(net.proj_bn, net.proj(swung(x, offsets[1])))).relu()
    y = norm(net.b1_bn, net.b1(x)).relu()
    norm(net.b2_bn, net.b2(y))
    return seen


@pytest.mark.parametrize("first", list(itertools.product(range(3), range(3))))
def test_strided_convolutions_see_a_shifted_input_each_by_its_own_offset(first):
    torch.manual_seed(0)
    module = Residual()
    network = network_of(module)
    offsets = torch.tensor([first, (2, 0)])
    tapped, targets = tap_batch_norms(network, swing=True)
    with torch.no_grad():
        expected = inputs_by_hand(module, images(), offsets)
        ours = tapped(images(), offsets)
    assert len(ours) == len(targets) == 6
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_convolutions_of_stride_1_and_pooling_are_left_alone():
    module = Net(
        lambda n, x: n.bn(n.b(nn.functional.max_pool2d(n.a(x), 2))),
        a=conv(), b=conv(4, 4), bn=nn.BatchNorm2d(4),
    )  # fmt: skip
    network = network_of(module)
    assert strided_nodes(network) == []
    tapped, _ = tap_batch_norms(network, swing=True)
    assert not any(n.name == "shifts" for n in tapped.graph.nodes)


@pytest.mark.parametrize("family", ["mobilenetv2", "shufflenetv2", "regnet"])
def test_families_take_one_offset_per_strided_convolution(family):
    module, network, x = read(family)
    count = sum(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in module.modules())
    assert len(strided_nodes(network)) == count > 1
    plain, _ = tap_batch_norms(network)
    tapped, _ = tap_batch_norms(network, swing=True)
    middle = torch.ones(count, 2, dtype=torch.long)
    with torch.no_grad():
        expected = plain(x)
        for a, b in zip(tapped(x, middle), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        for index in range(count):  # every offset matters to something
            offsets = middle.clone()
            offsets[index] = torch.tensor([0, 2])
            pairs = zip(tapped(x, offsets), expected, strict=True)
            assert any(not torch.allclose(a, b, atol=1e-5) for a, b in pairs)
