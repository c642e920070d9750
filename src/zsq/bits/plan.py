# SPDX-License-Identifier: Apache-2.0
"""The bits file: a bit-width for every layer of one network, why, and what else was possible."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from zsq.artifact.networkfile import fingerprint
from zsq.bits.costs import Budget, CostKind, LayerFacts, cost_of, stored_bytes
from zsq.bits.layers import fixed_bits
from zsq.bits.pareto import Frontier, monotone, pareto_frontier
from zsq.config import Recipe
from zsq.errors import UsageError, yaml_problem
from zsq.quantizers.protocol import place
from zsq.runtime.files import atomic_write
from zsq.settings import Bits, Override, Part
from zsq.student import prepared_network
from zsq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT: Literal[2] = 2
#: Points of the frontier that a file keeps for its picture.
POINTS = 200
Width = Annotated[int, Field(ge=2, le=8)]


class Point(Part):
    """One point of the frontier: cost in the budget's unit, and summed sensitivity."""

    cost: float
    sensitivity: float


class BitsPlan(Part):
    """Bits for every layer of one network; what ``zsq bits`` writes and every recipe accepts."""

    format: Literal[2] = FORMAT
    model: str
    """What the user typed."""
    network: str
    """Hash of the network's graph and weights."""
    protocol: str
    """The protocol that the layers were free under."""
    activations: Width
    kind: CostKind
    """What the budget bounds."""
    budget: str
    cost: float
    """In the budget's unit: average bits of the free layers, or bytes, bit operations or milliseconds of all."""
    sensitivity: float
    exact: bool = True
    layers: dict[str, Width]
    """Every layer's bits."""
    free: tuple[str, ...]
    """Layers whose bits were chosen; protocol and overrides fix the others."""
    weights: dict[str, int]
    """Every layer's number of weights."""
    depthwise: tuple[str, ...] = ()
    """Depthwise layers, which the ONNX file holds as INT8 at every width."""
    measured: dict[str, dict[int, float]]
    """Sensitivity of each free layer at each bit-width, in nats."""
    frontier: tuple[Point, ...]
    """Points of the frontier, cheapest first."""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        apart = sorted({*self.layers} ^ {*self.weights} | {*self.free} - {*self.layers})
        if apart:
            raise ValueError(f"layers, free and weights name different layers: {_listed(apart)}")
        return self

    def average(self) -> float:
        """Return the average bits per weight of the free layers."""
        count = sum(self.weights[path] for path in self.free)
        return sum(self.weights[path] * self.layers[path] for path in self.free) / count

    def bytes(self) -> int:
        """Return the size of all weights packed to their own widths, as ``student.safetensors`` has them."""
        return sum(-(-self.weights[path] * bits // 8) for path, bits in self.layers.items())

    def onnx_bytes(self) -> int:
        """Return the size of all weights in the ONNX file, what a budget of a size bounds."""
        return sum(
            stored_bytes(self.weights[path], bits, depthwise=path in self.depthwise)
            for path, bits in self.layers.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, with its average and its sizes."""
        own = {"average": self.average(), "bytes": self.bytes(), "onnx_bytes": self.onnx_bytes()}
        return self.model_dump(mode="json") | own

    def plot(self) -> Figure:
        """Draw the frontier with the chosen point; `zsq.bits.plots` has the sensitivities too."""
        from zsq.bits.plots import plot_frontier

        return plot_frontier(self)

    def widths(self) -> Bits:
        """Return what stands for ``w4a4`` of a recipe: the rounded average, and activations."""
        return Bits(weights=round(self.average()), activations=self.activations)

    def overrides(self, teacher: Teacher, recipe: Recipe) -> tuple[Override, ...]:
        """Return the recipe's overrides with those that put the plan into effect behind them.

        Activations that the recipe overrides stay as they are. What it fixes the plan has to agree
        with: the name of its protocol says what first and last layers get, and its overrides are
        the user's word.

        Args:
            teacher: the network to be quantized.
            recipe: loaded with the plan's `widths` as its bits.

        Raises:
            UsageError: the plan is for another network, its protocol leaves other layers free than
                the recipe's, or the recipe's overrides fix a layer to other bits.
        """
        if fingerprint(teacher.network) != self.network:
            raise UsageError(
                f"the bits file was made for another network ({self.model}, {len(self.layers)} layers) than "
                f"{teacher.info.reference}, or for other weights; make one with `zsq bits` for this network."
            )
        network = prepared_network(teacher, recipe)
        placed = place(network, recipe.protocol, recipe.bits, recipe.overrides).weights
        if set(placed) != set(self.layers):
            raise UsageError(
                f"the bits file names other layers than the {len(placed)} that are quantized: "
                f"{_listed(sorted(set(placed) ^ set(self.layers)))}; leave the names that `zsq bits` wrote."
            )
        ours, theirs = fixed_bits(network, self.protocol), fixed_bits(network, recipe.protocol)
        apart = [path for path in self.layers if (path in ours) != (path in theirs)]
        if apart:
            raise UsageError(
                f"the bits file was made under protocol {self.protocol} and recipe {recipe.name!r} has "
                f"{recipe.protocol}, of which only one fixes the bits of {_listed(apart)}; make one with "
                f"`zsq bits MODEL --recipe {recipe.name} --protocol {recipe.protocol}`, or quantize with "
                f"`--protocol {self.protocol}`."
            )
        for path, bits in self.layers.items():
            wanted = [
                o.weights for o in recipe.overrides if o.weights and fnmatchcase(path, o.match)
            ]
            if wanted and wanted[-1] != bits:
                raise UsageError(
                    f"the bits file gives layer {path!r} {bits} bits and an override of recipe {recipe.name!r} "
                    f"fixes it to {wanted[-1]}; drop the override (--set 'overrides=[]'), or write it into a "
                    "recipe file and make the bits file with `zsq bits MODEL --recipe FILE`."
                )
        own = (
            Override(match=glob.escape(path), weights=bits) for path, bits in self.layers.items()
        )
        return (*recipe.overrides, *own)

    def save(self, path: Path) -> None:
        """Write the file."""
        data = self.model_dump(mode="json")
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> BitsPlan:
        """Read what `save` wrote.

        Raises:
            UsageError: missing, or not a bits file.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            reason = (
                error.errors()[0]["msg"] if isinstance(error, ValidationError) else yaml_problem(error)
            )  # fmt: skip
            raise UsageError(
                f"{path} is not a readable bits file ({reason[:150]}); give widths like w4a4, or the "
                "bits.yaml that `zsq bits MODEL --budget ... -o FOLDER` wrote."
            ) from error


def read_plan(bits: str | None) -> BitsPlan | None:
    """Read a bits file where one is named; widths like ``w4a4`` are none.

    Raises:
        UsageError: the file is not a bits file.
    """
    is_file = bits is not None and bits.endswith((".yaml", ".yml"))
    return BitsPlan.load(Path(bits)) if bits is not None and is_file else None


def make_plan(
    teacher: Teacher, recipe: Recipe, budget: Budget, measured: dict[str, dict[int, float]],
    facts: dict[str, LayerFacts],
) -> BitsPlan:  # fmt: skip
    """Choose the bits of the free layers.

    Args:
        teacher: whose layers.
        recipe: names protocol, activation bits and the layers that overrides fix.
        budget: an average is over the free layers; all others count the fixed layers too.
        measured: sensitivities of the free layers.
        facts: of every layer.

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
        frontier=_points(frontier, taken, scale),
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


def _listed(paths: list[str]) -> str:
    """Name layers, a few of them where they are many."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


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
