# SPDX-License-Identifier: Apache-2.0
"""The frontier against every configuration there is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq.bits.pareto import monotone, pareto_frontier
from zsq.errors import UsageError

WIDTHS = (2, 4, 8)
layer = st.tuples(
    st.integers(1, 50), st.lists(st.integers(0, 100), min_size=3, max_size=3).map(sorted)
)
networks = st.lists(layer, min_size=1, max_size=6)


def tables(network):
    costs = [{b: size * b for b in WIDTHS} for size, _ in network]
    losses = [dict(zip(WIDTHS, sorted(values, reverse=True), strict=True)) for _, values in network]
    return costs, losses


def everything(costs, losses):
    for bits in itertools.product(WIDTHS, repeat=len(costs)):
        cost = sum(c[b] for c, b in zip(costs, bits, strict=True))
        yield cost, sum(v[b] for v, b in zip(losses, bits, strict=True)), bits


@given(networks)
def test_the_frontier_is_that_of_brute_force(network):
    costs, losses = tables(network)
    best = {}
    for cost, loss, _ in everything(costs, losses):
        best[cost] = min(loss, best.get(cost, loss))
    expected, lowest = [], float("inf")
    for cost in sorted(best):
        if best[cost] < lowest:
            lowest = best[cost]
            expected.append((cost, lowest))
    frontier = pareto_frontier(costs, losses)
    assert frontier.exact
    assert list(zip(frontier.costs, frontier.sensitivities, strict=True)) == expected


@given(networks)
def test_every_point_is_what_its_bits_add_up_to(network):
    costs, losses = tables(network)
    frontier = pareto_frontier(costs, losses)
    for index in range(len(frontier)):
        choice = frontier.choice(index)
        assert choice.cost == sum(c[b] for c, b in zip(costs, choice.bits, strict=True))
        assert choice.sensitivity == sum(v[b] for v, b in zip(losses, choice.bits, strict=True))


@given(networks, st.integers(0, 2400))
def test_a_budget_gets_the_best_that_fits(network, budget):
    costs, losses = tables(network)
    fitting = [loss for cost, loss, _ in everything(costs, losses) if cost <= budget]
    frontier = pareto_frontier(costs, losses)
    if fitting:
        choice = frontier.within(budget)
        assert choice.cost <= budget
        assert choice.sensitivity == min(fitting)
    else:
        with pytest.raises(UsageError, match="smallest possible cost"):
            frontier.within(budget)


def test_eight_layers_of_six_widths_equal_brute_force():
    """6**8 configurations would take minutes in Python; 3**8 do not."""
    network = [(7 * i % 11 + 1, [i * i % 17, i % 5, 1]) for i in range(8)]
    costs, losses = tables([(size, sorted(values)) for size, values in network])
    frontier = pareto_frontier(costs, losses)
    for budget in range(100, 400, 7):
        fitting = [loss for cost, loss, _ in everything(costs, losses) if cost <= budget]
        if fitting:
            assert frontier.within(budget).sensitivity == min(fitting)


def test_without_room_the_frontier_is_near_and_says_so():
    costs = [{b: (13 * i + 7) * b for b in range(2, 9)} for i in range(12)]
    losses = [{b: (i % 5 + 1) / 2**b for b in range(2, 9)} for i in range(12)]
    exact, thin = pareto_frontier(costs, losses), pareto_frontier(costs, losses, room=64)
    assert exact.exact
    assert not thin.exact
    assert len(thin) <= 64
    budget = sum(c[4] for c in costs)
    assert thin.within(budget).cost <= budget
    assert thin.within(budget).sensitivity <= 1.2 * exact.within(budget).sensitivity


def test_sensitivity_never_rises_with_bits():
    values = {2: 0.5, 3: 0.7, 4: 0.1, 8: 0.2}
    smooth = monotone(values)
    assert list(smooth) == [2, 3, 4, 8]
    assert smooth == {2: 0.7, 3: 0.7, 4: 0.2, 8: 0.2}
