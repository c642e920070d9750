# SPDX-License-Identifier: Apache-2.0
"""From sensitivities and a budget to a plan: which bits each layer gets, and what cannot be had."""

from __future__ import annotations

from collections.abc import Sequence

from zsq.artifact.networkfile import fingerprint
from zsq.bits.costs import Budget, CostKind, LayerFacts, cost_of
from zsq.bits.layers import fixed_bits
from zsq.bits.pareto import Frontier, monotone, pareto_frontier
from zsq.bits.plan import BitsPlan, EdgePlan, Point
from zsq.config import Recipe
from zsq.errors import UsageError
from zsq.student import prepared_network
from zsq.teacher.teacher import Teacher

#: Points of the frontier that a file keeps for its picture.
POINTS = 200


def make_plan(
    teacher: Teacher, recipe: Recipe, budget: Budget, measured: dict[str, dict[int, float]],
    facts: dict[str, LayerFacts], edges: EdgePlan | None = None,
) -> BitsPlan:  # fmt: skip
    """Choose the bits of the free layers.

    Args:
        teacher: whose layers.
        recipe: names protocol, activation bits and the layers that overrides fix.
        budget: an average is over the free layers; all others count the fixed layers too.
        measured: sensitivities of the free layers.
        facts: of every layer.
        edges: what was chosen for the tensors between them before, from `fit_edges`.

    Raises:
        UsageError: no choice meets the budget.
    """
    free = list(measured)
    kind = budget.kind
    fixed = fixed_bits(prepared_network(teacher, recipe), recipe.protocol, recipe.overrides)
    smoothed = {path: monotone(values) for path, values in measured.items()}
    costs = [_distinct({b: cost_of(facts[path], b, kind) for b in smoothed[path]}) for path in free]
    losses = [{b: smoothed[path][b] for b in own} for path, own in zip(free, costs, strict=True)]
    frontier = pareto_frontier(costs, losses)
    taken, scale = _unit(kind, free, facts, fixed)
    cheapest = float(frontier.costs[0])
    _refuse_unreachable(budget, cheapest, taken, scale)
    choice = frontier.within(max(budget.amount * scale - taken, cheapest))
    return BitsPlan(
        model=teacher.info.reference, network=fingerprint(teacher.network), protocol=recipe.protocol,
        activations=recipe.bits.activations, kind=kind, budget=str(budget),
        cost=(choice.cost + taken) / scale, sensitivity=choice.sensitivity, exact=frontier.exact,
        layers=fixed | dict(zip(free, choice.bits, strict=True)), free=tuple(free),
        weights={path: fact.weights for path, fact in facts.items()}, measured=measured,
        depthwise=tuple(path for path, fact in facts.items() if fact.depthwise),
        frontier=_points(frontier, taken, scale), edges=edges,
    )  # fmt: skip


def fit_edges(
    budget: float, measured: dict[str, dict[int, float]], values: dict[str, int]
) -> EdgePlan:
    """Choose the bits of the free tensors between layers.

    Args:
        budget: average bits per value.
        measured: their sensitivities, see `zsq.bits.edges.measure_edges`.
        values: how many values of one image each has.

    Raises:
        UsageError: no choice meets the budget.
    """
    smoothed = {name: monotone(found) for name, found in measured.items()}
    total = float(sum(values[name] for name in measured))
    frontier = pareto_frontier(
        [{b: float(values[name] * b) for b in found} for name, found in smoothed.items()],
        list(smoothed.values()),
    )
    choice = frontier.within(budget * total)
    return EdgePlan(
        budget=budget, cost=choice.cost / total, sensitivity=choice.sensitivity, exact=frontier.exact,
        edges=dict(zip(measured, choice.bits, strict=True)), values={name: values[name] for name in measured},
        measured=measured, frontier=_points(frontier, 0.0, total),
    )  # fmt: skip


def _distinct(costs: dict[int, float]) -> dict[int, float]:
    """Keep the widest of the bit-widths that cost the same, as INT4 makes 2, 3 and 4 do."""
    widest = {costs[bits]: bits for bits in sorted(costs)}
    return {bits: cost for cost, bits in widest.items()}


def _unit(
    kind: CostKind, free: list[str], facts: dict[str, LayerFacts], fixed: dict[str, int]
) -> tuple[float, float]:
    """Return what makes costs of the free layers amounts of a budget: an addend and a divisor."""
    if kind == "average":
        return 0.0, float(sum(facts[path].weights for path in free))
    return sum(cost_of(facts[path], bits, kind) for path, bits in fixed.items()), 1.0


def check_budget(
    budget: Budget, facts: dict[str, LayerFacts], fixed: dict[str, int], candidates: Sequence[int]
) -> None:
    """Refuse a budget that nothing meets before anything is measured; times are only known then.

    Args:
        budget: what is wanted.
        facts: of every layer.
        fixed: bits of the layers that are not free.
        candidates: bit-widths of the others.

    Raises:
        UsageError: even the fewest bits everywhere cost more.
    """
    if budget.kind == "latency":
        return
    free = [path for path in facts if path not in fixed]
    cheapest = sum(min(cost_of(facts[path], b, budget.kind) for b in candidates) for path in free)
    _refuse_unreachable(budget, cheapest, *_unit(budget.kind, free, facts, fixed))


def _refuse_unreachable(budget: Budget, cheapest: float, taken: float, scale: float) -> None:
    """Say the smallest possible in the budget's own unit, where that is more than the budget.

    Raises:
        UsageError: it is.
    """
    smallest = Budget(budget.kind, (cheapest + taken) / scale)
    if budget.amount * (1 + 1e-9) < smallest.amount:
        raise UsageError(
            f"no choice of bits meets {budget}; the smallest possible is {smallest}"
            f"{_of_fixed(budget, taken)}. Raise --budget or allow fewer bits with --candidates."
        )


def _of_fixed(budget: Budget, taken: float) -> str:
    if not taken:
        return ""
    return f", {Budget(budget.kind, taken)} of it layers whose bits are fixed"


def _points(frontier: Frontier, taken: float, scale: float) -> tuple[Point, ...]:
    count = len(frontier)
    places = sorted(
        {round(i * (count - 1) / max(POINTS - 1, 1)) for i in range(min(POINTS, count))}
    )
    if count <= POINTS:
        places = list(range(count))
    return tuple(
        Point(
            cost=(float(frontier.costs[i]) + taken) / scale,
            sensitivity=float(frontier.sensitivities[i]),
        )
        for i in places
    )
