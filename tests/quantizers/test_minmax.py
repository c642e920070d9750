# SPDX-License-Identifier: Apache-2.0
"""Min-max quantizers: master weights and tracked activation ranges."""

import pytest
import torch

from zsq.functional.affine import dequantize, quant_max, quantize
from zsq.quantizers.minmax import MinMaxWeight, TrackedActivation, minmax_grid, straight_through
from zsq.quantizers.weight import SoftRoundWeight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_those_of_the_published_quantizer(bits):
    """``s = (2^k - 1) / (hi - lo)``, ``z = round(s lo) + 2^(k-1)``, for channels of both signs."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    shape = (-1, 1, 1, 1)
    s = ((2**bits - 1) / (high - low)).reshape(shape)
    z = torch.round(s * low.reshape(shape)) + 2 ** (bits - 1)
    code = (s * weight - z).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    found = MinMaxWeight(weight, bits)
    assert torch.allclose(found(), (code + z) / s)
    assert torch.equal(found.codes(), (code + 2 ** (bits - 1)).to(torch.uint8))


def test_one_sided_channels_keep_zero():
    found = MinMaxWeight(torch.tensor([[0.5, 1.0], [-2.0, -1.0]]), 4)
    assert found.zero_point.tolist() == [0.0, 15.0]
    assert torch.allclose(found()[:, [1]][0], torch.tensor([1.0]))


def test_the_gradient_passes_straight_through_and_the_grid_follows():
    found = MinMaxWeight(torch.randn(4, 6), 3)
    found().square().sum().backward()
    assert torch.equal(found.master.grad, 2 * found().detach())
    before = found.scale
    with torch.no_grad():
        found.master.mul_(2)
    assert torch.allclose(found.scale, 2 * before)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_tuned_weight_is_gone_on_from(bits):
    """Its integers and its grid; a master that rounds to them already stays where it is."""
    weight = torch.randn(6, 3, 3, 3)
    tuned = SoftRoundWeight(weight, bits)
    with torch.no_grad():
        tuned.rounding.neg_()  # against the nearest integer, everywhere
        tuned.rounding[:3].neg_()
    tuned = tuned.freeze()
    found = MinMaxWeight(weight, bits)
    found.go_on_from(tuned)
    assert torch.equal(found.codes(), tuned.codes())
    assert torch.equal(found.scale, tuned.scale)
    assert torch.equal(found.zero_point, tuned.zero_point)
    assert torch.allclose(found(), tuned())
    distance = found.master.detach() / tuned.scale.view(-1, 1, 1, 1)
    distance = distance + tuned.zero_point.view(-1, 1, 1, 1) - tuned.codes()
    assert float(distance.abs().max()) <= 0.4 + 1e-4
    near = (weight - tuned()).abs() <= 0.4 * tuned.scale.view(-1, 1, 1, 1)
    assert torch.allclose(found.master[near], weight[near])
    with torch.no_grad():
        found.master.mul_(3)
    assert torch.equal(found.scale, tuned.scale)


def test_frozen_weights_are_equal():
    found = MinMaxWeight(torch.randn(4, 6), 4)
    frozen = found.freeze()
    assert torch.equal(frozen(), found().detach())
    assert torch.equal(frozen.codes(), found.codes())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_straight_through_is_quantize_and_dequantize(bits):
    x, scale, zero = torch.randn(6, 50), torch.rand(6) / 4 + 0.01, torch.arange(6.0) % 3
    codes = quantize(x, scale, zero, quant_max(bits))
    found = straight_through(x, scale, zero, quant_max(bits))
    assert torch.equal(found, dequantize(codes, scale, zero))


def test_straight_through_also_where_clamped():
    x = torch.tensor([-5.0, 0.1, 99.0], requires_grad=True)
    straight_through(x, torch.tensor(1.0), torch.tensor(0.0), 15).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_can_stop_where_a_code_was_clamped(dtype):
    """What autograd says of clamping to half a step beyond the outermost grid points."""
    torch.manual_seed(0)
    scale, zero = torch.tensor(0.375), torch.tensor(2.0)
    x = (4 * torch.randn(50, 20)).to(dtype).requires_grad_()
    upstream = torch.randn(50, 20).to(dtype)
    found = straight_through(x, scale, zero, 7, stop=True)
    assert torch.equal(found, straight_through(x, scale, zero, 7))
    found.backward(upstream)
    theirs = x.detach().clone().requires_grad_()
    theirs.clamp(-2.5 * 0.375, 5.5 * 0.375).backward(upstream)
    ties = (x.detach() == -2.5 * 0.375) | (x.detach() == 5.5 * 0.375)
    assert torch.equal(x.grad[~ties], theirs.grad[~ties])
    assert 0.05 < (x.grad == 0).float().mean() < 0.95


def test_low_precision_is_rounded_in_float32_and_stays_low():
    x = (3 * torch.randn(40, 7)).bfloat16().requires_grad_()
    found = straight_through(x, torch.tensor(0.37), torch.tensor(3.0), 15)
    wide = straight_through(x.detach().float(), torch.tensor(0.37), torch.tensor(3.0), 15)
    assert torch.equal(found, wide.bfloat16())
    upstream = torch.randn_like(x)
    found.backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("shape", [(5, 30), (5, 3, 4, 2), (5, 3, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_grid_spans_each_channel_and_zero(shape, layout):
    weight = torch.randn(shape) + 1
    if len(shape) == 4:
        weight = weight.contiguous(memory_format=layout)
    scale, zero = minmax_grid(weight, 3)
    for i, row in enumerate(weight):
        span = max(float(row.max()), 0.0) - min(float(row.min()), 0.0)
        assert float(scale[i]) == pytest.approx(span / 7, rel=1e-6)
        assert float(zero[i]) == round(-min(float(row.min()), 0.0) / (span / 7))


def tracked(decay=0.9):
    quantizer = TrackedActivation(4, decay=decay)
    quantizer.tracking = True
    return quantizer


def test_ranges_are_exact_after_five_constant_batches():
    quantizer = tracked()
    for _ in range(5):
        quantizer(torch.tensor([0.0, 0.25, 1.0]))
        assert torch.allclose(quantizer.range(), torch.tensor([0.0, 1.0]), atol=1e-6)
        assert float(quantizer.scale) == pytest.approx(1 / 15, rel=1e-5)


def test_ranges_are_the_bias_corrected_average():
    quantizer = tracked(0.8)
    highs = [1.0, 3.0, 2.0, 5.0]
    for high in highs:
        quantizer(torch.tensor([-high / 2, high]))
    weights = [0.2 * 0.8 ** (len(highs) - 1 - i) for i in range(len(highs))]
    average = sum(w * h for w, h in zip(weights, highs, strict=True)) / sum(weights)
    assert quantizer.range().tolist() == pytest.approx([-average / 2, average], rel=1e-5)
    assert float(quantizer.zero_point) == 5.0


def test_nothing_changes_once_tracking_ends():
    quantizer = tracked()
    quantizer(torch.rand(100))
    quantizer.tracking = False
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    x = 7 * torch.rand(100)
    x.requires_grad_()
    quantizer(x).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    assert x.grad.tolist() == [1.0] * 100
    value = quantizer(x)
    quantizer.settle()
    assert torch.equal(quantizer(x), value)
