# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.weight import FrozenWeight, SoftRoundWeight, round_to_nearest
from zsq.teacher.layers import Layer


def layer(bias=True, groups=1):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4 // groups, 3, 3, generator=generator)
    return Layer(
        "aten.conv2d.default", weight, torch.randn(6, generator=generator) if bias else None,
        ([2, 1], [1, 1], [1, 1], groups),
    )  # fmt: skip


def images():
    return torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_computes_the_layer_with_the_quantizers_weight(bias, groups):
    source = layer(bias, groups)
    frozen = round_to_nearest(source.weight, 4)
    quantized = QuantizedLayer.of(source, frozen)
    expected = functional.conv2d(images(), frozen(), source.bias, (2, 1), (1, 1), 1, groups)
    assert torch.equal(quantized(images()), expected)
    doubled = quantized.apply_weight(images(), 2 * frozen())
    shift = 0 if source.bias is None else source.bias.reshape(-1, 1, 1)
    assert torch.allclose(doubled - shift, 2 * (expected - shift), atol=1e-5)
    assert quantized.bits == 4


def test_linear_layers_too():
    source = Layer("aten.linear.default", torch.randn(5, 8), torch.randn(5))
    quantized = QuantizedLayer.of(source, round_to_nearest(source.weight, 8))
    x = torch.randn(3, 8)
    assert torch.equal(quantized(x), functional.linear(x, quantized.weight(), source.bias))


def test_the_bias_is_a_copy():
    source = layer()
    quantized = QuantizedLayer.of(source, round_to_nearest(source.weight, 4))
    with torch.no_grad():
        quantized.bias.zero_()
    assert source.bias.abs().sum().item() > 0


def test_freezing_replaces_learned_rounding_by_its_integers():
    source = layer()
    quantized = QuantizedLayer.of(source, SoftRoundWeight(source.weight, 3))
    with pytest.raises(TypeError, match="SoftRoundWeight"):
        _ = quantized.frozen
    codes = quantized.weight.codes()
    quantized.freeze()
    assert isinstance(quantized.frozen, FrozenWeight)
    assert torch.equal(quantized.frozen.codes(), codes)
    before = quantized.frozen
    quantized.freeze()
    assert quantized.frozen is before
    assert quantized.bits == 3


def test_a_snapped_bias_is_whole_accumulator_steps_and_moves_by_at_most_half_of_one():
    source = layer()
    quantized = QuantizedLayer.of(source, round_to_nearest(source.weight, 4))
    scale = torch.tensor(0.037)
    quantized.snap_bias(scale)
    step = 0.037 * quantized.frozen.scale.double()
    whole = quantized.bias.double() / step
    assert torch.allclose(whole, whole.round(), atol=1e-3)
    assert bool(((quantized.bias - source.bias).abs() <= 0.5001 * step).all())
    assert not torch.equal(quantized.bias, source.bias)
    once = quantized.bias.clone()
    quantized.snap_bias(scale)
    assert torch.equal(quantized.bias, once)
    QuantizedLayer.of(layer(False), round_to_nearest(source.weight, 4)).snap_bias(scale)


def test_a_copy_is_independent_and_complete():
    source = layer()
    quantized = QuantizedLayer.of(source, round_to_nearest(source.weight, 4)).eval()
    quantized.add_module("norm", nn.BatchNorm2d(6))
    copied = copy.deepcopy(quantized)
    assert torch.equal(copied(images()), quantized(images()))
    assert isinstance(copied.norm, nn.BatchNorm2d)
    assert not copied.training
    copied.frozen.scale.mul_(2)
    copied.bias.data.zero_()
    assert not torch.equal(copied(images()), quantized(images()))
    first, second = copy.deepcopy([quantized, quantized])
    assert first is second
