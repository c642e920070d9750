# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsq.functional.affine import Grid, search_weight_grid
from zsq.quantizers.weight import FrozenWeight, SoftRoundWeight, round_to_nearest

BITS = st.integers(2, 8)


@st.composite
def weights(draw):
    """Weights of a few channels whose sizes differ, odd ones among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    channels = draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(3, 3, 3), (1, 3, 3), (4, 1, 1), (5,), (2, 3)]))
    weight = torch.randn(channels, *shape, generator=generator)
    weight *= 10 ** (3 * torch.rand(channels, generator=generator) - 2).reshape(
        -1, *[1] * len(shape)
    )
    odd = draw(st.sampled_from(["none", "zero", "positive", "negative", "constant"]))
    if odd == "zero":
        weight[0] = 0
    elif odd == "constant":
        weight[0] = 0.7
    elif odd != "none":
        weight[0] = weight[0].abs() * (1 if odd == "positive" else -1)
    return weight


def by_hand(codes, scale, zero_point):
    """Dequantize code by code, in Python integers and doubles."""
    values = []
    for c in range(len(codes)):
        z, s = int(zero_point[c]), float(scale[c])
        values += [(int(q) - z) * s for q in codes[c].flatten()]
    return torch.tensor(values, dtype=torch.float64).reshape(codes.shape)


def in_range(weight, grid, bits):
    shape = (-1, *[1] * (weight.ndim - 1))
    code = torch.floor(weight / grid.scale.reshape(shape)) + grid.zero_point.reshape(shape)
    return (code >= 0) & (code < 2**bits - 1)


# --- integers ------------------------------------------------------------------------------------


@given(weights(), BITS)
def test_frozen_weights_are_integers_times_steps(weight, bits):
    frozen = round_to_nearest(weight, bits)
    codes = frozen.codes()
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert torch.equal(frozen.zero_point, frozen.zero_point.round())
    assert bool(((frozen.zero_point >= 0) & (frozen.zero_point < 2**bits)).all())
    assert torch.allclose(
        frozen().double(), by_hand(codes, frozen.scale, frozen.zero_point), rtol=1e-6, atol=0
    )


@given(weights(), BITS)
def test_zero_is_kept_exactly(weight, bits):
    weight[:, ..., 0] = 0
    assert float(round_to_nearest(weight, bits)()[:, ..., 0].abs().max()) == 0


@given(weights(), BITS)
def test_a_channel_has_at_most_two_to_the_bits_values(weight, bits):
    for channel in round_to_nearest(weight, bits)():
        assert len(channel.unique()) <= 2**bits


@given(weights(), BITS)
def test_quantizing_a_quantized_weight_on_its_own_grid_changes_nothing(weight, bits):
    once = round_to_nearest(weight, bits)
    grid = Grid(once.scale, once.zero_point, torch.zeros(len(weight)))
    again = round_to_nearest(once(), bits, grid)
    assert torch.equal(again.codes(), once.codes())


@given(weights(), BITS)
def test_order_within_a_channel_is_kept(weight, bits):
    flat = weight.flatten(1).sort(1).values
    assert bool((round_to_nearest(flat, bits)().diff(dim=1) >= 0).all())


@given(weights(), BITS)
def test_no_code_is_nearer_than_the_one_chosen(weight, bits):
    frozen = round_to_nearest(weight, bits)
    error = (frozen() - weight).abs().double()
    step = frozen.scale.double().reshape(-1, *[1] * (weight.ndim - 1))
    for offset in (-1, 1):
        codes = (frozen.codes().int() + offset).clamp(0, 2**bits - 1)
        other = by_hand(codes, frozen.scale, frozen.zero_point)
        assert bool(((other - weight).abs() >= error - 1e-3 * step).all())


def test_a_saved_weight_comes_back_to_the_bit():
    frozen = round_to_nearest(torch.randn(4, 3, 3, 3), 4)
    other = FrozenWeight(torch.zeros(4, 3, 3, 3), torch.ones(4), torch.zeros(4), 4)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(), frozen())
    assert not list(frozen.parameters())


# --- learned rounding ----------------------------------------------------------------------------


@given(weights(), BITS, st.booleans())
def test_a_fresh_soft_weight_is_the_float_weight_where_it_is_in_range(weight, bits, log_scale):
    grid = search_weight_grid(weight, bits)
    soft = SoftRoundWeight(weight, bits, grid, log_scale=log_scale)
    inside = in_range(weight, grid, bits)
    step = grid.scale.reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
    error = ((soft() - weight).abs() / step)[inside]
    assert bool((error < 1e-4).all())
    rest = soft()[~inside] / step[~inside]  # clipped to an end of the grid
    assert torch.allclose(rest, rest.round(), atol=1e-3)


@given(weights(), BITS)
def test_hard_rounding_of_a_fresh_soft_weight_is_rounding_to_nearest(weight, bits):
    grid = search_weight_grid(weight, bits)
    ratio = weight / grid.scale.reshape(-1, *[1] * (weight.ndim - 1))
    clear = ((ratio - ratio.floor()) - 0.5).abs() > 1e-4  # ties may go either way
    nearest = round_to_nearest(weight, bits, grid).codes()
    assert torch.equal(SoftRoundWeight(weight, bits, grid).codes()[clear], nearest[clear])


@given(weights(), BITS, st.integers(0, 2**32))
def test_whatever_was_learned_freezing_gives_codes_next_to_the_weight(weight, bits, seed):
    grid = search_weight_grid(weight, bits)
    soft = SoftRoundWeight(weight, bits, grid)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        soft.rounding.copy_(torch.randn(weight.shape, generator=generator) * 5)
        soft.raw_scale.add_(torch.randn(len(weight), generator=generator) * 0.1)
    frozen = soft.freeze()
    shape = (-1, *[1] * (weight.ndim - 1))
    base = torch.floor(weight / grid.scale.reshape(shape)) + grid.zero_point.reshape(shape)
    expected = (base + (soft.rounding >= 0)).clamp(0, 2**bits - 1)
    assert torch.equal(frozen.codes().float(), expected)
    assert torch.equal(frozen.scale, soft.scale)
    assert torch.equal(frozen.zero_point, grid.zero_point)
    assert not frozen().requires_grad


@given(weights(), BITS)
def test_decided_bits_give_the_frozen_weight(weight, bits):
    soft = SoftRoundWeight(weight, bits)
    with torch.no_grad():
        soft.rounding.copy_(torch.where(soft.rounding >= 0, 9.0, -9.0))
    assert soft.undecided() == 0
    assert torch.allclose(soft(), soft.freeze()(), rtol=1e-6, atol=0)


def test_undecided_counts_the_bits_between():
    soft = SoftRoundWeight(torch.randn(2, 10), 4)
    with torch.no_grad():
        soft.rounding.fill_(9)
        soft.rounding.view(-1)[:5] = 0
    assert soft.undecided() == pytest.approx(0.25)


def soft_weight(log_scale, dtype=torch.float64):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weight[:, 0] *= 4  # the search clips these
    grid = search_weight_grid(weight.float(), 3)
    grid = Grid(grid.scale.to(dtype), grid.zero_point.to(dtype), grid.error)
    return SoftRoundWeight(weight, 3, grid, log_scale=log_scale), weight, grid


def test_the_gradient_to_the_step_is_the_whole_integer_code():
    """GENIE-M: not the code less w / s, as in LSQ (section 4.2 of the paper)."""
    soft, _, grid = soft_weight(log_scale=False)
    upstream = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        soft.rounding.copy_(torch.where(soft.rounding >= 0, 9.0, -9.0))
    (soft() * upstream).sum().backward()
    code = soft.codes().double() - grid.zero_point[:, None]
    assert torch.allclose(soft.raw_scale.grad, (code * upstream).sum(1), rtol=1e-6)


@pytest.mark.parametrize("log_scale", [True, False])
def test_gradients_equal_finite_differences(log_scale):
    soft, _, _ = soft_weight(log_scale)

    def weight(raw_scale, rounding):
        return torch.func.functional_call(soft, {"raw_scale": raw_scale, "rounding": rounding}, ())

    inputs = [p.detach().clone().requires_grad_() for p in (soft.raw_scale, soft.rounding)]
    assert torch.autograd.gradcheck(weight, inputs)


def test_clipped_weights_have_no_gradient_to_their_bit():
    soft, weight, grid = soft_weight(log_scale=True)
    soft().sum().backward()
    outside = ~in_range(weight, grid, 3)
    assert bool(outside.any())
    assert not bool(outside.all())
    assert float(soft.rounding.grad[outside].abs().max()) == 0
    assert float(soft.rounding.grad[~outside].abs().min()) > 0


@pytest.mark.parametrize("log_scale", [True, False])
def test_steps_stay_positive_wherever_they_are_pushed(log_scale):
    soft, _, _ = soft_weight(log_scale)
    for value in (-3.0, 0.0):
        with torch.no_grad():
            soft.raw_scale.fill_(value)
        assert bool((soft.scale > 0).all())
        assert bool(torch.isfinite(soft()).all())


def test_the_base_is_a_constant_when_the_step_moves():
    soft, _, _ = soft_weight(log_scale=False)
    before, codes = soft().detach(), soft.codes()
    with torch.no_grad():
        soft.raw_scale.mul_(1.5)
    assert torch.allclose(soft(), before * 1.5)
    assert torch.equal(soft.codes(), codes)


def test_the_soft_bits_of_the_last_pass_are_kept_for_the_regulariser():
    soft, _, _ = soft_weight(log_scale=True)
    soft()
    assert torch.equal(soft.used_bits, soft.soft_bits())
    soft.used_bits.sum().backward()
    assert float(soft.rounding.grad.abs().sum()) > 0


def test_state_comes_back_to_the_bit():
    soft, _, _ = soft_weight(log_scale=True)
    other = SoftRoundWeight(torch.randn(3, 8).double(), 3)
    other.double().load_state_dict(soft.state_dict())
    assert torch.equal(other(), soft())
    assert torch.equal(other.codes(), soft.codes())


def test_a_weight_in_tuning_can_be_copied():
    soft, _, _ = soft_weight(log_scale=True)
    soft().sum().backward()
    copied = copy.deepcopy(soft)
    assert torch.equal(copied(), soft())


def test_an_all_zero_channel_stays_zero_and_finite():
    weight = torch.zeros(2, 9)
    weight[1] = torch.linspace(-1, 1, 9)
    soft = SoftRoundWeight(weight, 4)
    assert torch.equal(soft()[0], torch.zeros(9))
    assert torch.equal(soft.freeze()()[0], torch.zeros(9))
    soft().square().sum().backward()
    assert bool(torch.isfinite(soft.raw_scale.grad).all())
    assert bool(torch.isfinite(soft.rounding.grad).all())
