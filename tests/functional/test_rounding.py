# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsq.functional.rounding import (
    beta_at,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_regularizer,
)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_the_inverse_undoes_the_rectified_sigmoid(values):
    h = torch.tensor(values)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=2e-7)


@given(st.floats(-2, 2))
def test_the_rectified_sigmoid_is_the_papers_formula(v):
    expected = min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1))
    assert float(rectified_sigmoid(torch.tensor(v))) == pytest.approx(expected, abs=1e-6)


def test_both_ends_are_reached_exactly_and_stop_moving():
    v = torch.tensor([-3.0, -2.5, 2.5, 3.0], requires_grad=True)
    h = rectified_sigmoid(v)
    assert h.tolist() == [0, 0, 1, 1]
    h.sum().backward()
    assert v.grad.tolist() == [0, 0, 0, 0]


@given(st.integers(0, 50), st.integers(0, 50), st.floats(2, 20))
def test_the_regularizer_counts_undecided_bits(decided, undecided, beta):
    h = torch.cat([torch.arange(decided) % 2, torch.full((undecided,), 0.5)])
    assert float(rounding_regularizer(h, beta)) == undecided


@given(st.floats(0.01, 0.99), st.floats(2, 20))
def test_the_regularizer_is_the_papers_formula_and_pulls_outwards(value, beta):
    h = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss = rounding_regularizer(h, beta)
    assert loss.item() == pytest.approx(1 - abs(2 * value - 1) ** beta, abs=1e-9)
    loss.backward()
    if abs(value - 0.5) > 0.1:
        assert math.copysign(1, float(-h.grad)) == math.copysign(1, value - 0.5)


def test_beta_is_flat_during_the_warm_up_then_falls_in_a_line():
    betas = [beta_at(step, 1000) for step in range(1001)]
    assert betas[:201] == [20.0] * 201
    slopes = {round(a - b, 9) for a, b in itertools.pairwise(betas[200:])}
    assert slopes == {round(18 / 800, 9)}
    assert betas[-1] == pytest.approx(2)


def test_beta_obeys_its_arguments():
    assert beta_at(0, 10, start=8, end=4, warmup=0) == 8
    assert beta_at(5, 10, start=8, end=4, warmup=0) == 6
    assert beta_at(4, 10, start=8, end=4, warmup=0.5) == 8
    assert beta_at(0, 0) == pytest.approx(20)
