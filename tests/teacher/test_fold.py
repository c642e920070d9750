# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.networks import Inverted, Net, Residual, conv, images, network_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zsq.teacher.fold import Pair, find_pairs, fold_batch_norms, fold_layer
from zsq.teacher.layers import BatchNorm, Layer


def pairs_of(module):
    return [(p.layer, p.batch_norm) for p in find_pairs(network_of(module))]


def test_pairs_follow_the_graph_not_the_order_of_definition():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.second_bn, self.first_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.second, self.first = conv(4, 4), conv()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            x = self.first_bn(self.first(x))
            return self.fc(self.second_bn(self.second(x)).mean((2, 3)))

    assert pairs_of(Mixed()) == [("first", "first_bn"), ("second", "second_bn")]


@pytest.mark.parametrize(
    "function",
    [
        lambda n, x: n.bn(n.a(x) + n.b(x)),
        lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 1)[:, 2:6]),
        lambda n, x: n.bn(n.a(x).relu()),
        lambda n, x: n.bn(y := n.a(x)) + y,
        lambda n, x: n.bn(n.same(n.same(n.a(x)))),
    ],
    ids=["add", "concat", "activation", "two readers", "layer called twice"],
)
def test_what_cannot_be_folded_stays_and_outputs_stay_too(function):
    module = Net(function, a=conv(), b=conv(), same=conv(4, 4), bn=nn.BatchNorm2d(4))
    network = network_of(module)
    assert find_pairs(network) == []
    folded = fold_batch_norms(network)
    assert sum(isinstance(m, BatchNorm) for m in folded.modules()) == 1
    assert torch.equal(folded(images()), network(images()))


def test_a_norm_that_is_called_twice_is_folded_twice():
    module = Net(lambda n, x: n.bn(n.b(n.bn(n.a(x)))), a=conv(), b=conv(4, 4), bn=nn.BatchNorm2d(4))
    network = network_of(module)
    assert [p.layer for p in find_pairs(network)] == ["a", "b"]
    assert torch.allclose(fold_batch_norms(network)(images()), module(images()), atol=1e-5)


@pytest.mark.parametrize("make", [Residual, Inverted])
def test_after_folding_no_batch_norm_is_left_and_outputs_agree(make):
    module = make()
    network = network_of(module)
    folded = fold_batch_norms(network)
    assert not any(isinstance(m, BatchNorm) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    expected = module(images())
    assert torch.allclose(folded(images()), expected, atol=1e-5)


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([1, 2, 4]))
def test_a_folded_layer_is_the_layer_and_its_norm(seed, bias, groups):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    arguments = ([2, 1], [1, 0], [1, 1], groups)
    layer = Layer(
        "aten.conv2d.default", normal(8, 4 // groups, 3, 3), normal(8) if bias else None, arguments
    )
    # gammas of both signs and of zero, variances from tiny to large
    gamma = normal(8) * (torch.rand(8, generator=generator) > 0.2)
    variance = 10 ** (normal(8) * 2)
    norm = BatchNorm(gamma, normal(8), normal(8), variance, 1e-5)
    x = normal(2, 4, 6, 6)
    with torch.no_grad():
        expected = norm(layer(x))
        fold_layer(layer, norm)
        assert torch.allclose(
            layer(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
    assert layer.weight.dtype == layer.bias.dtype == torch.float32


def test_folded_weights_are_the_text_book_formula():
    layer = Layer("aten.linear.default", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2))
    norm = BatchNorm(
        torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25]),
        torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.25]), 0.0,
    )  # fmt: skip
    fold_layer(layer, norm)
    assert layer.weight.tolist() == [[1.0, 2.0], [-6.0, -8.0]]
    assert layer.bias.tolist() == [0.5, 4.25]


def test_a_pair_names_both_modules():
    network = network_of(Net(lambda n, x: n.bn(n.c(x)), c=conv(), bn=nn.BatchNorm2d(4)))
    assert find_pairs(network) == [Pair(layer="c", batch_norm="bn")]
