# SPDX-License-Identifier: Apache-2.0
"""The multiplier at which codes change, against brute force and against the codes themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq.functional.affine import quant_max, quantize
from zsq.functional.crossing import crossing_multipliers, multiplier_for_share
from zsq.quantizers.minmax import minmax_grid


def problem(seed, bits, shape=(6, 40), size=0.01):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    direction = size * torch.randn(shape, generator=generator) ** 3
    return weight, direction, *minmax_grid(weight, bits)


def codes(weight, scale, zero_point, bits):
    return quantize(weight, scale, zero_point, quant_max(bits))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8))
def test_codes_hold_before_and_change_at_the_multiplier(seed, bits):
    weight, direction, scale, zero = problem(seed, bits)
    at = crossing_multipliers(weight, direction, scale, zero, bits)
    start = codes(weight, scale, zero, bits)
    finite = at.isfinite()
    after = codes(torch.where(finite, weight - at * direction, weight), scale, zero, bits)
    assert (after != start)[finite].all(), "every element has really crossed at its multiplier"
    assert ((after - start).abs() <= 1).all(), "and has gone no further than the next code"
    before = codes(weight - 0.99 * at.clamp(max=1e6) * direction, scale, zero, bits)
    late = finite & (0.01 * at * direction.abs() > 1e-4 * scale[:, None])
    assert (before == start)[late].all(), "and not much earlier"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8))
def test_what_never_crosses_is_infinite(seed, bits):
    weight, direction, scale, zero = problem(seed, bits)
    at = crossing_multipliers(weight, direction, scale, zero, bits)
    far = codes(weight - 1e9 * direction.sign(), scale, zero, bits)
    start = codes(weight, scale, zero, bits)
    assert torch.equal(at.isinf(), (far == start) | (direction == 0))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), target=st.floats(1e-4, 1.0), cap=st.sampled_from([8.0, 128.0, 1e6])
)
def test_share_against_brute_force_over_all_thresholds(seed, target, cap):
    at = crossing_multipliers(*problem(seed, 4, size=0.03), 4).reshape(1, -1)
    found = float(multiplier_for_share(at, target, cap)[0])
    wanted = max(math.ceil(target * at.numel()), 1)
    candidates = sorted({1.0, *[float(a) for a in at[0] if 1.0 <= a <= cap]})
    enough = [a for a in candidates if int((at <= a).sum()) >= wanted]
    assert found == (enough[0] if enough else candidates[-1])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", [1e-3, 1e-2, 0.2])
def test_the_share_is_really_reached(bits, target):
    weight, direction, scale, zero = problem(3, bits, (32, 300), 1e-6)
    at = crossing_multipliers(weight, direction, scale, zero, bits)
    a = multiplier_for_share(at.reshape(1, -1), target, 1e9)
    moved = codes(weight - a * direction, scale, zero, bits)
    changed = (moved != codes(weight, scale, zero, bits)).float().mean()
    assert target <= changed <= target + 2 / weight.numel()


def test_edges():
    scale, zero = torch.tensor([1.0]), torch.tensor([0.0])
    outward = crossing_multipliers(
        torch.tensor([[3.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), scale, zero, 2
    )
    assert outward.isinf().all(), "outermost codes cannot go further out"
    broken = torch.tensor([[0.0, math.nan, math.inf]])
    assert crossing_multipliers(torch.ones(1, 3), broken, scale, zero, 2).isinf().all()
    nothing = torch.full((1, 5), torch.inf)
    assert multiplier_for_share(nothing, 0.5, 128.0).tolist() == [1.0]
    already = torch.tensor([[0.2, 0.4, 0.6, 9.0]])
    assert multiplier_for_share(already, 0.75, 128.0).tolist() == [1.0], "no step is shrunk"
    beyond = torch.tensor([[2.0, 3.0, 500.0, 600.0]])
    assert multiplier_for_share(beyond, 1.0, 128.0).tolist() == [3.0], "as many as the cap allows"
