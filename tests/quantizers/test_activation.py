# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsq.errors import RunError
from zsq.functional.affine import Grid
from zsq.quantizers.activation import ActivationQuantizer

BITS = st.integers(2, 8)
SCALES = st.floats(2**-13, 2**8, width=32)


def quantizer(bits=4, scale=0.1, zero_point=0, **options):
    made = ActivationQuantizer(bits, **options)
    made.set_grid(Grid(torch.tensor(scale), torch.tensor(float(zero_point)), torch.tensor(0.0)))
    return made


def sample(seed, scale=1.0, count=200):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale * 8


@st.composite
def cases(draw):
    bits = draw(BITS)
    scale = draw(SCALES)
    zero_point = draw(st.integers(0, 2**bits - 1))
    made = quantizer(bits, scale, zero_point, log_scale=draw(st.booleans()))
    made.requires_grad_(False)
    return made, sample(draw(st.integers(0, 2**32)), scale)


@given(cases())
def test_results_lie_on_the_grid(case):
    made, x = case
    codes = made(x) / made.scale + made.zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert float(codes.round().min()) >= 0
    assert float(codes.round().max()) <= 2**made.bits - 1
    assert len(made(x).unique()) <= 2**made.bits


@given(cases())
def test_zero_is_exact_and_quantizing_again_changes_nothing(case):
    made, x = case
    assert float(made(torch.zeros(1))) == 0
    once = made(x)
    assert torch.allclose(made(once), once, rtol=0, atol=1e-6 * float(once.abs().max()) + 1e-30)


@given(cases())
def test_order_is_kept(case):
    made, x = case
    assert bool((made(x.sort().values).diff() >= 0).all())


@given(cases())
def test_the_step_is_the_one_that_was_set(case):
    made, _ = case
    again = quantizer(made.bits, made.scale.item(), log_scale=not made.log_scale)
    assert again.scale.item() == pytest.approx(made.scale.item(), rel=1e-6)
    assert bool(again.calibrated)


def test_until_it_is_calibrated_it_says_so():
    assert not bool(ActivationQuantizer(4).calibrated)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_refused(scale):
    with pytest.raises(RunError, match="NaN or Inf"):
        quantizer(scale=scale)


@pytest.mark.parametrize("log_scale", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_tensor_of_zeros_gives_a_tiny_step_not_none(scale, log_scale):
    made = quantizer(scale=scale, log_scale=log_scale)
    assert 0 < made.scale.item() <= 2e-8
    assert bool(torch.isfinite(made(sample(0))).all())


def test_narrowed_codes_clip_as_the_folded_activation_did():
    made = quantizer(bits=4, scale=0.5, zero_point=6)
    made.low, made.high = 6, 10  # a ReLU and a clip at 2.0
    x = sample(0)
    expected = quantizer(bits=4, scale=0.5, zero_point=6)(x).clamp(0.0, 2.0)
    assert torch.equal(made(x), expected)


def test_switched_off_it_is_the_identity():
    made = quantizer()
    made.enabled = False
    x = sample(0)
    assert made(x) is x


# --- QDrop ---------------------------------------------------------------------------------------


def test_dropping_everything_is_the_identity_with_no_gradient_to_the_step():
    made = quantizer()
    made.drop = 1.0
    x = sample(0).requires_grad_()
    y = made(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert float(made.raw_scale.grad) == 0


def test_dropping_nothing_quantizes_everything():
    x = sample(0)
    made = quantizer()
    expected = made(x)
    made.drop = 0.0
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("drop", [0.25, 0.5])
def test_elements_pass_through_or_are_quantized_one_by_one(drop):
    made, reference = quantizer(), quantizer()
    made.drop = drop
    torch.manual_seed(0)
    x = sample(1, 0.1, 20000)
    y = made(x)
    kept, quantized = y == x, y == reference(x)
    assert bool((kept | quantized).all())
    share = float((~quantized).float().mean()) / float((reference(x) != x).float().mean())
    assert share == pytest.approx(drop, abs=0.02)
    neighbours = (kept[1:] & kept[:-1]).float().mean()
    assert float(neighbours) == pytest.approx(drop**2, abs=0.02), "independent of each other"


def test_a_new_mask_is_drawn_every_time_and_seeds_repeat_them():
    made, x = quantizer(), sample(0)
    made.drop = 0.5
    torch.manual_seed(0)
    first, second = made(x), made(x)
    assert not torch.equal(first, second)
    made.drop = 0.5  # forgets the pool of random numbers
    torch.manual_seed(0)
    assert torch.equal(made(x), first)


def test_settled_it_is_constant_and_always_quantizes():
    made, x = quantizer(scale=0.3), sample(0)
    expected, scale = made(x), made.scale.clone()
    made.drop = 0.5
    made.settle()
    assert torch.equal(made.scale, scale)
    assert torch.equal(made(x), expected)
    assert torch.equal(made(x), expected), "no chance is left"
    made.settle()
    assert torch.equal(made.scale, scale), "settling twice is settling once"


def test_settling_keeps_results_to_the_bit():
    for seed in range(20):
        made = quantizer(scale=float(sample(seed).abs().max()))
        x = sample(seed + 100)
        expected = made(x)
        made.settle()
        assert torch.equal(made(x), expected)


# --- gradients -----------------------------------------------------------------------------------


def test_the_gradient_to_the_logarithm_is_the_step_times_that_to_the_step():
    plain, log = quantizer(log_scale=False), quantizer(log_scale=True)
    x = sample(0)
    for made in (plain, log):
        made(x).square().sum().backward()
    assert float(log.raw_scale.grad) == pytest.approx(0.1 * float(plain.raw_scale.grad), rel=1e-4)


def test_following_the_gradient_lowers_the_error():
    made, x = quantizer(scale=1.0), sample(0).abs()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)

    def error():
        return (made(x) - x).square().mean()

    before = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.5 * before


# --- copies --------------------------------------------------------------------------------------


def test_state_and_copies_are_complete():
    made, x = quantizer(bits=3, scale=0.7, zero_point=2), sample(0)
    other = ActivationQuantizer(3)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    assert bool(other.calibrated)
    made.drop = 0.5
    made(x).sum().backward()
    copied = copy.deepcopy(made)
    copied.drop = made.drop = 0.0
    assert torch.equal(copied(x), made(x))
