# SPDX-License-Identifier: Apache-2.0
"""Attention written out, against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from zsq.teacher.decompose import attention
from zsq.teacher.inspect import floating_layers
from zsq.teacher.teacher import load_teacher

MASK = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
MASK[:, 0] = True  # no query without a key


@pytest.mark.parametrize("heads", [(), (2,), (3, 4)])
@pytest.mark.parametrize("options", [
    {}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": MASK}, {"attn_mask": torch.randn(5, 7)},
    {"attn_mask": torch.randn(5, 7), "scale": 2.0},
])  # fmt: skip
def test_it_is_pytorchs_attention(heads, options):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, *heads, n, d) for n, d in ((5, 6), (7, 6), (7, 3)))
    wanted = scaled_dot_product_attention(query, key, value, **options)
    assert torch.allclose(attention(query, key, value, **options), wanted, atol=1e-5)


def test_several_heads_may_share_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    wanted = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(attention(query, key, value, enable_gqa=True), wanted, atol=1e-5)


class Mixed(nn.Module):
    """Tokens of a convolution, mixed by attention and by einsum."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        query, key, value = self.qkv(self.stem(x).relu().flatten(2).transpose(1, 2)).chunk(3, -1)
        scores = torch.einsum("bic,bjc->bij", query, key).softmax(-1)
        return self.fc((scaled_dot_product_attention(query, key, value) + scores @ value).mean(1))


def test_a_network_of_both_is_the_same_for_any_batch():
    torch.manual_seed(0)
    net = Mixed().eval()
    teacher = load_teacher(net, input_shape=(3, 8, 8))
    names = {str(n.target) for n in teacher.network.graph.nodes}
    assert not any("einsum" in name or "attention" in name for name in names)
    for batch in (1, 3, 6):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(teacher(x), net(x), atol=1e-6)


class Weighted(nn.Module):
    """A product with a parameter that is no layer's, directly or by einsum."""

    def __init__(self, by_einsum):
        super().__init__()
        self.stem, self.weight, self.fc = (
            nn.Conv2d(3, 8, 3),
            nn.Parameter(torch.randn(8, 8)),
            nn.Linear(8, 5),
        )
        self.by_einsum = by_einsum

    def forward(self, x):
        y = self.stem(x).relu().flatten(2).transpose(1, 2)
        y = torch.einsum("btc,cd->btd", y, self.weight) if self.by_einsum else y @ self.weight
        return self.fc(y.mean(1))


@pytest.mark.parametrize("by_einsum", [False, True])
def test_products_with_stored_tensors_are_listed_before_a_run(by_einsum):
    found = floating_layers(load_teacher(Weighted(by_einsum).eval(), input_shape=(3, 8, 8)).network)
    assert len(found) == 1
    assert floating_layers(load_teacher(Mixed().eval(), input_shape=(3, 8, 8)).network) == ()
