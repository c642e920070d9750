# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from zsq.errors import UsageError
from zsq.functional.affine import (
    dequantize,
    fake_quantize,
    quant_max,
    quantize,
    search_activation_grid,
    search_weight_grid,
)

BITS = st.integers(2, 8)
NUMBERS = st.floats(-100, 100, width=32)
ROWS = st.lists(NUMBERS, min_size=1, max_size=12)
SCALES = st.floats(2**-13, 2**10, width=32)


def rows(*values):
    return torch.tensor(values)


def grid_and_codes(weight, bits, **options):
    grid = search_weight_grid(weight, bits, **options)
    return grid, quantize(weight, grid.scale, grid.zero_point, quant_max(bits))


def min_max_error(x, bits, power=2.4):
    """Error of the plain grid from min(x, 0) to max(x, 0), written with NumPy-like scalars."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = max((high - low) / (2**bits - 1), 1e-8)
    zero = min(max(round(-low / step), 0), 2**bits - 1)
    codes = ((x.double() / step).round() + zero).clamp(0, 2**bits - 1)
    return float((((codes - zero) * step - x.double()).abs() ** power).mean())


# --- codes and values ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(UsageError, match=r"2\.\.8"):
        quant_max(bits)


@given(ROWS, BITS, SCALES, st.data())
def test_codes_are_whole_and_in_range(values, bits, scale, data):
    high = quant_max(bits)
    zero_point = data.draw(st.integers(0, high))
    codes = quantize(rows(*values), torch.tensor(scale), torch.tensor(zero_point), high)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 2**bits - 1


@given(BITS, SCALES, st.data())
def test_zero_is_exact(bits, scale, data):
    zero_point = torch.tensor(float(data.draw(st.integers(0, quant_max(bits)))))
    codes = quantize(torch.zeros(1), torch.tensor(scale), zero_point, quant_max(bits))
    assert float(dequantize(codes, torch.tensor(scale), zero_point)) == 0.0


@given(ROWS, BITS, SCALES, st.data())
def test_quantizing_again_changes_nothing(values, bits, scale, data):
    high = quant_max(bits)
    s = torch.tensor(scale)
    z = torch.tensor(float(data.draw(st.integers(0, high))))
    once = fake_quantize(rows(*values), s, z, high)
    assert torch.equal(fake_quantize(once, s, z, high), once)


@given(ROWS, BITS, SCALES, st.data())
def test_quantizing_keeps_order(values, bits, scale, data):
    high = quant_max(bits)
    z = torch.tensor(float(data.draw(st.integers(0, high))))
    x = rows(*values).sort().values
    assert bool((fake_quantize(x, torch.tensor(scale), z, high).diff() >= 0).all())


@given(ROWS, BITS, SCALES, st.data())
def test_inside_the_range_the_error_is_at_most_half_a_step(values, bits, scale, data):
    high = quant_max(bits)
    zero_point = data.draw(st.integers(0, high))
    x = rows(*values)
    inside = (x / scale >= -zero_point) & (x / scale <= high - zero_point)
    y = fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), high)
    assert bool(((y - x).abs()[inside] <= scale * 0.5 * (1 + 1e-5) + 1e-6).all())


def test_a_scale_per_channel_is_a_scale_per_row():
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    scale, zero = torch.tensor([0.1, 0.2, 0.05]), torch.tensor([3.0, 8.0, 0.0])
    codes = quantize(x, scale, zero, 15)
    values = dequantize(codes, scale, zero)
    for c in range(3):
        alone = quantize(x[c], scale[c], zero[c], 15)
        assert torch.equal(codes[c], alone)
        assert torch.equal(values[c], dequantize(alone, scale[c], zero[c]))


# --- the search for a grid -----------------------------------------------------------------------


@given(st.lists(ROWS, min_size=1, max_size=4), BITS)
def test_search_is_never_worse_than_min_and_max(channels, bits):
    length = min(map(len, channels))
    weight = rows(*[channel[:length] for channel in channels])
    grid, codes = grid_and_codes(weight, bits)
    for c, channel in enumerate(weight):
        plain = min_max_error(channel, bits)
        assert float(grid.error[c]) <= plain * (1 + 1e-3) + 1e-6
        value = dequantize(codes[c], grid.scale[c], grid.zero_point[c])
        own = float((value - channel).double().abs().pow(2.4).mean())
        assert own == pytest.approx(float(grid.error[c]), rel=1e-3, abs=1e-6)


def test_search_beats_min_and_max_where_an_outlier_would_waste_the_codes():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 2000, generator=generator)
    weight[0, 0] = 12.0
    grid = search_weight_grid(weight, 3)
    assert float(grid.error) < 0.5 * min_max_error(weight[0], 3)


def test_search_tries_every_hundredth_of_the_range():
    # All mass at +-1 and one far outlier whose error hardly counts: the best ratio is known.
    weight = torch.cat([torch.tensor([-1.0, 1.0]).repeat(5000), torch.tensor([100.0])])[None] / 100
    grid = search_weight_grid(weight, 8, power=0.5, zero_in_range=True)
    ratios = grid.scale * 255 / (weight.max() - weight.min())
    assert float(ratios * 100) == pytest.approx(round(float(ratios * 100)), abs=1e-3)
    assert float(ratios) < 0.9


@given(st.lists(ROWS, min_size=1, max_size=3), BITS)
def test_weight_grids_are_finite_and_hold_zero(channels, bits):
    length = min(map(len, channels))
    grid, _ = grid_and_codes(rows(*[channel[:length] for channel in channels]), bits)
    assert bool(torch.isfinite(grid.scale).all())
    assert bool((grid.scale > 0).all())
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert bool(((grid.zero_point >= 0) & (grid.zero_point <= 2**bits - 1)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "channel",
    [[0.0] * 9, [0.3, 0.4, 0.5], [-0.3, -0.4, -0.5], [0.7], [-0.7], [0.0], [1e-30, -1e-30],
     [100.0, 100.1, 100.2], [-1e-12]],
)  # fmt: skip
def test_odd_channels_get_usable_grids(channel, bits):
    weight = rows(channel)
    grid, codes = grid_and_codes(weight, bits)
    value = dequantize(codes, grid.scale, grid.zero_point)
    assert bool(torch.isfinite(value).all())
    assert 0 <= float(grid.zero_point) <= 2**bits - 1
    reach = float(weight.abs().max())
    assert float((value - weight).abs().max()) <= max(reach / (2**bits - 1), 1e-8)


@pytest.mark.parametrize("value", [0.7, -0.7])
def test_a_single_weight_is_kept(value):
    weight = rows([value])
    grid, codes = grid_and_codes(weight, 4)
    assert float(dequantize(codes, grid.scale, grid.zero_point)) == pytest.approx(value, rel=1e-5)


def test_without_zero_in_range_a_one_sided_channel_spends_all_codes_on_its_range():
    weight = torch.linspace(5, 6, 16)[None]
    grid = search_weight_grid(weight, 4, zero_in_range=False, candidates=1)
    assert float(grid.scale) == pytest.approx(1 / 15, rel=1e-4)
    assert float(grid.zero_point) == -75


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_grid_has_its_zero_point_in_the_middle(bits):
    # -min / step is 3.5 at 3 bits and would round to 3 or 4 with the noise (public code: to 3)
    x = torch.tensor([-1.0, -0.6, 0.2, 1.0])
    grid = search_activation_grid(x, bits, asymmetric=False)
    assert float(grid.zero_point) == 2 ** (bits - 1)


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12), BITS)
def test_activations_without_negatives_count_from_zero(values, bits):
    grid = search_activation_grid(rows(*values), bits)
    assert float(grid.zero_point) == 0
    assert 0 < float(grid.scale) <= max(max(values) / (2**bits - 1), 1e-8) * (1 + 1e-6)


@given(ROWS, BITS)
def test_an_asymmetric_grid_is_never_worse_than_a_symmetric_one(values, bits):
    x = rows(*values)
    free = search_activation_grid(x, bits)
    symmetric = search_activation_grid(x, bits, asymmetric=False)
    assert float(free.error) <= float(symmetric.error)
    assert free.scale.ndim == free.zero_point.ndim == 0


def test_an_asymmetric_grid_wastes_no_codes_on_a_short_tail():
    x = torch.nn.functional.silu(torch.linspace(-8, 8, 4001))
    free = search_activation_grid(x, 4)
    symmetric = search_activation_grid(x, 4, asymmetric=False)
    assert float(free.error) < 0.4 * float(symmetric.error)
    assert float(free.zero_point) in {0.0, 1.0, 2.0}


# --- fake quantization: values and gradients ---


@given(st.integers(0, 2**32), BITS, st.integers(-8, 8), st.data())
def test_values_equal_torchs_fake_quantize(seed, bits, exponent, data):
    scale, high = 2.0**exponent, quant_max(bits)  # a power of two: division is exact in both
    zero_point = data.draw(st.integers(0, high))
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * scale * high
    ours = fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), high)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, high)
    assert torch.equal(ours, theirs)


def test_narrowed_codes_clip():
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    y = fake_quantize(x, torch.tensor(0.1), torch.tensor(4.0), high=10, low=4)
    assert torch.allclose(y, torch.tensor([0.0, 0.0, 0.5, 0.6]))


def gradients(x, scale, upstream, function):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (function(x, scale) * upstream).sum().backward()
    return x.grad, scale.grad


def straight_through(x, scale, zero_point, low, high):
    """The same map by autograd: clip first, then round with the gradient of the identity."""
    clipped = torch.clamp(x / scale, low - zero_point, high - zero_point)
    return (clipped + (torch.round(clipped) - clipped).detach()) * scale


@pytest.mark.parametrize(
    ("value", "to_x", "to_scale"),
    [
        (0.34, 1.0, 3 - 3.4),  # inside: rounded - ratio
        (-0.26, 1.0, -3 + 2.6),
        (0.0, 1.0, 0.0),
        (5.0, 0.0, 11.0),  # above: the largest code less the zero point
        (-5.0, 0.0, -4.0),  # below: the smallest
    ],
)
def test_gradients_of_the_lsq_paper(value, to_x, to_scale):
    x, scale = torch.tensor([value]), torch.tensor(0.1)
    gx, gs = gradients(
        x, scale, torch.ones(1), lambda x, s: fake_quantize(x, s, torch.tensor(4.0), 15)
    )
    assert float(gx) == to_x
    assert float(gs) == pytest.approx(to_scale, abs=1e-5)


@given(st.integers(0, 2**32), BITS, st.floats(2**-6, 2, width=32), st.data())
def test_gradients_equal_autograd_of_the_straight_through_formula(seed, bits, scale, data):
    high = quant_max(bits)
    low = data.draw(st.integers(0, high - 1))
    z = torch.tensor(float(data.draw(st.integers(0, high))))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 7, generator=generator) * scale * high
    upstream = torch.randn(3, 5, 7, generator=generator)
    ratio = x / scale
    assume(
        bool(((ratio - (low - z)).abs().min() > 1e-5) & ((ratio - (high - z)).abs().min() > 1e-5))
    )
    s = torch.tensor(scale)
    ours = gradients(x, s, upstream, lambda x, s: fake_quantize(x, s, z, high, low))
    theirs = gradients(x, s, upstream, lambda x, s: straight_through(x, s, z, low, high))
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-3 * high)


def test_gradients_do_not_depend_on_the_memory_format():
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    s, z = torch.tensor(0.1), torch.tensor(4.0)
    plain = gradients(x, s, upstream, lambda x, s: fake_quantize(x, s, z, 15))
    last = x.to(memory_format=torch.channels_last)
    other = gradients(last, s, upstream, lambda x, s: fake_quantize(x, s, z, 15))
    assert torch.equal(plain[0], other[0])
    assert torch.allclose(plain[1], other[1], rtol=1e-5)


def test_kept_elements_pass_through_with_their_gradient_and_none_to_the_scale():
    x = torch.tensor([0.34, 0.34, 9.0, 9.0, -9.0])
    keep = torch.tensor([True, False, True, False, True])
    s, z = torch.tensor(0.1), torch.tensor(4.0)
    y = fake_quantize(x, s, z, 15, keep=keep)
    assert torch.allclose(y, torch.tensor([0.34, 0.3, 9.0, 1.1, -9.0]))
    assert torch.equal(y[keep], x[keep])
    gx, gs = gradients(x, s, torch.ones(5), lambda x, s: fake_quantize(x, s, z, 15, keep=keep))
    assert gx.tolist() == [1, 1, 1, 0, 1]
    assert float(gs) == pytest.approx((3 - 3.4) + 11, abs=1e-5)
    assert keep.tolist() == [True, False, True, False, True], "the mask itself is left alone"


def test_the_input_is_left_alone():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(4.0), 15, keep=x > 0)
    assert torch.equal(x, before)


def test_without_gradients_the_numbers_are_the_same():
    """Evaluation takes a shorter way; what is evaluated is what was trained."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    for zero_point in (0.0, 7.0):
        grid = torch.tensor(0.173), torch.tensor(zero_point)
        with_gradients = fake_quantize(x.clone().requires_grad_(), *grid, 14, 1)
        before = x.clone()
        with torch.no_grad():
            without = fake_quantize(x, *grid, 14, 1)
        assert torch.equal(with_gradients.detach(), without)
        assert torch.equal(x, before)
