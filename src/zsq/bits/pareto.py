# SPDX-License-Identifier: Apache-2.0
"""The exact Pareto frontier of bit-widths: a dynamic programme that drops what is dominated.

Layers add up, in cost exactly and in sensitivity by ZeroQ's assumption (arXiv 2001.00281, section
3.3), so a partial choice that is beaten in both by another can never be part of a best one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zsq.errors import UsageError

#: Partial choices that are kept at most; beyond, the best of each slice of the cost axis.
ROOM = 200_000


@dataclass(frozen=True)
class Choice:
    """One point of the frontier.

    Attributes:
        cost: summed over layers.
        sensitivity: summed over layers.
        bits: of each layer.
    """

    cost: float
    sensitivity: float
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Frontier:
    """All choices that no other beats in both cost and sensitivity, cheapest first.

    Attributes:
        costs: ascending, (P,).
        sensitivities: descending, (P,).
        exact: False where partial choices had to be left out.
        trail: per layer the partial choice that each one extends, and by which bits.
    """

    costs: NDArray[np.float64]
    sensitivities: NDArray[np.float64]
    exact: bool
    trail: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]

    def __len__(self) -> int:
        return len(self.costs)

    def choice(self, index: int) -> Choice:
        """Return one point with the bits of every layer."""
        bits, place = [], index % len(self)
        for parents, widths in reversed(self.trail):
            bits.append(int(widths[place]))
            place = int(parents[place])
        return Choice(
            float(self.costs[index]), float(self.sensitivities[index]), tuple(reversed(bits))
        )

    def within(self, budget: float) -> Choice:
        """Return the least sensitive choice of at most a cost.

        Raises:
            UsageError: even the cheapest costs more.
        """
        index = int(np.searchsorted(self.costs, budget * (1 + 1e-12), side="right")) - 1
        if index < 0:
            raise UsageError(
                f"no choice of bits costs at most {budget:.6g}; the smallest possible cost is "
                f"{self.costs[0]:.6g}. Raise --budget or allow fewer bits with --candidates."
            )
        return self.choice(index)


def pareto_frontier(
    costs: Sequence[Mapping[int, float]], sensitivities: Sequence[Mapping[int, float]], *,
    room: int = ROOM,
) -> Frontier:  # fmt: skip
    """Find every choice of bits that no other beats.

    Args:
        costs: per layer, cost by bits.
        sensitivities: per layer, sensitivity by the same bits.
        room: partial choices to keep; exact unless more are undominated at once.

    Example:
        >>> frontier = pareto_frontier([{2: 2, 4: 4}, {2: 2, 4: 4}], [{2: 9, 4: 1}, {2: 3, 4: 2}])
        >>> [frontier.choice(i).bits for i in range(len(frontier))]
        [(2, 2), (4, 2), (4, 4)]
    """
    cost, loss = np.zeros(1), np.zeros(1)
    trail, exact = [], True
    for own_cost, own_loss in zip(costs, sensitivities, strict=True):
        widths = np.array(sorted(own_cost), dtype=np.int64)
        cost = np.add.outer(cost, [float(own_cost[w]) for w in widths.tolist()]).ravel()
        loss = np.add.outer(loss, [float(own_loss[w]) for w in widths.tolist()]).ravel()
        kept = _undominated(cost, loss)
        if len(kept) > room:
            kept, exact = _thinned(kept, cost, room), False
        trail.append((kept // len(widths), widths[kept % len(widths)]))
        cost, loss = cost[kept], loss[kept]
    return Frontier(cost, loss, exact, tuple(trail))


def _undominated(cost: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of undominated pairs, by ascending cost."""
    order = np.lexsort((loss, cost))
    best_before = np.minimum.accumulate(loss[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = loss[order][1:] < best_before[:-1]
    return order[better]


def _thinned(
    kept: NDArray[np.int64], cost: NDArray[np.float64], room: int
) -> NDArray[np.int64]:  # fmt: skip
    """Keep the last, and so least sensitive, of each of ``room`` equal slices of the cost axis."""
    own = cost[kept]
    edges = (own - own[0]) / max(own[-1] - own[0], 1e-300) * (room - 1)
    slices = edges.astype(np.int64)
    last = np.ones(len(kept), dtype=bool)
    last[:-1] = slices[1:] != slices[:-1]
    last[0] = True
    return kept[last]


def monotone(sensitivities: Mapping[int, float]) -> dict[int, float]:
    """Make a layer's sensitivity fall with its bits: measured on few images, it is noisy.

    Example:
        >>> monotone({2: 1.0, 4: 0.1, 8: 0.2})
        {2: 1.0, 4: 0.2, 8: 0.2}
    """
    highest, result = 0.0, {}
    for bits in sorted(sensitivities, reverse=True):
        highest = max(highest, sensitivities[bits])
        result[bits] = highest
    return dict(sorted(result.items()))
