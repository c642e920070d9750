# SPDX-License-Identifier: Apache-2.0
"""Operations counted, against the formula."""

import pytest
import torch
from torch import nn

from zsq.bench.flops import count_flops


def passes(module, x):
    def step():
        module(x).square().sum().backward()

    return step


def conv_flops(out_shape, weight):
    """Two operations per output value and weight that it sees."""
    return 2 * torch.Size(out_shape).numel() * weight[0].numel()


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"groups": 4}, {"groups": 8}, {"dilation": 2}], ids=str
)
def test_a_convolution_is_counted_by_the_formula_and_again_for_each_gradient(options):
    conv = nn.Conv2d(8, 8, 3, **options)
    x = torch.randn(2, 8, 9, 9)
    forward = conv_flops(conv(x).shape, conv.weight)
    assert count_flops(lambda: conv(x)) == forward
    assert count_flops(passes(conv, x)) == 2 * forward  # the weight's gradient
    assert count_flops(passes(conv, x.requires_grad_())) == 3 * forward
    assert count_flops(passes(conv.requires_grad_(False), x)) == 2 * forward  # the input's


def test_a_transposed_convolution_is_counted_by_the_formula():
    conv = nn.ConvTranspose2d(6, 4, 3, stride=2)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    forward = 2 * x.numel() * conv.weight[0].numel()
    assert count_flops(passes(conv, x)) == 3 * forward


def test_a_linear_layer_is_counted_and_a_batch_norm_is_not():
    layer, norm = nn.Linear(5, 7), nn.BatchNorm1d(7)
    x = torch.randn(3, 5)
    assert count_flops(lambda: norm(layer(x))) == 2 * 3 * 5 * 7
