# SPDX-License-Identifier: Apache-2.0
"""What a run recorded over time: losses, gradients that agree or not, integers that change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zsq.functional.agreement import OVERALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
#: Fields of a record that are no measured values.
_FRAME = frozenset({"time", "stage", "step", "batch", "unit", "piece", "index"})


@dataclass(frozen=True)
class Series:
    """One value over steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LossHistory:
    """Loss terms over time, per stage.

    Attributes:
        stages: ``{stage: {term: series}}``.
    """

    stages: dict[str, dict[str, Series]]

    def to_dict(self) -> dict[str, Any]:
        """Return the history as plain data."""
        return asdict(self)

    def plot(self) -> Figure:
        """Draw one panel per stage."""
        figure, panels = _panels(max(len(self.stages), 1))
        for axes, (stage, terms) in zip(panels, self.stages.items(), strict=False):
            for name, series in terms.items():
                axes.plot(series.steps, series.values, linewidth=1, label=name)
            positive = all(v > 0 for s in terms.values() for v in s.values)
            axes.set(title=stage, xlabel="step", yscale="log" if positive else "linear")
            axes.legend(fontsize=7)
        return figure


def loss_history(records: Sequence[Record]) -> LossHistory:
    """Collect every number that the stages of a run recorded.

    Blocks that are reconstructed one after another follow each other in a stage of their own.

    Args:
        records: from `zsq.runtime.metrics.read_metrics`.

    Example:
        >>> loss_history([{"stage": "synthesis", "step": 0, "loss": 2.0}]).stages["synthesis"]["loss"]
        Series(steps=(0,), values=(2.0,))
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    begins = _begins(records)
    for record in records:
        if record.get("stage") == "agreement":
            continue
        block = "piece" in record
        terms = found.setdefault(f"{record['stage']}{', block by block' if block else ''}", {})
        step = int(record["step"]) + (begins[record["stage"], record["piece"]] if block else 0)
        for name, value in record.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in _FRAME and number:
                terms.setdefault(name, []).append((step, float(value)))
    return LossHistory(
        {s: {n: _series(p) for n, p in terms.items()} for s, terms in found.items() if terms}
    )


def _begins(records: Sequence[Record]) -> dict[tuple[str, str], int]:
    """Return after how many steps of a stage each block begins, in the order of their first records."""
    lengths: dict[tuple[str, str], int] = {}
    for record in records:
        if "piece" in record:
            key = record["stage"], record["piece"]
            lengths[key] = max(lengths.get(key, 0), int(record["step"]) + 1)
    passed: dict[str, int] = {}
    begins = {}
    for (stage, piece), length in lengths.items():
        begins[stage, piece] = passed.get(stage, 0)
        passed[stage] = begins[stage, piece] + length
    return begins


@dataclass(frozen=True)
class Agreement:
    """Cosine between the gradients of two loss terms over training (AIT, section 3).

    Attributes:
        terms: names, e.g. ``kl,ce``.
        overall: over all quantized weights together.
        layers: per layer.
    """

    terms: str
    overall: Series
    layers: dict[str, Series]

    @property
    def opposed(self) -> float:
        """Share of the recorded steps at which the terms pulled apart."""
        values = self.overall.values
        return sum(v < 0 for v in values) / max(len(values), 1)

    @property
    def mean(self) -> float:
        """Mean cosine."""
        return sum(self.overall.values) / max(len(self.overall.values), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the agreement as plain data."""
        return asdict(self) | {"opposed": self.opposed, "mean": self.mean}

    def plot(self) -> Figure:
        """Draw the overall cosine, and the layers' as thin lines."""
        figure, (axes,) = _panels(1)
        for series in self.layers.values():
            axes.plot(series.steps, series.values, color="grey", linewidth=0.4, alpha=0.5)
        axes.plot(self.overall.steps, self.overall.values, linewidth=1.5, label="all weights")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="step", ylabel="cosine", ylim=(-1, 1), title=f"gradients of {self.terms}")
        axes.legend(fontsize=7)
        return figure


def agreement(records: Sequence[Record]) -> Agreement | None:
    """Collect the recorded cosines of the first pair of terms; None where there are none."""
    found = [record for record in records if record.get("stage") == "agreement"]
    pairs = [key for key in (found[0] if found else {}) if "," in key]
    if not pairs:
        return None
    series = {
        name: _series([(record["step"], record[pairs[0]][name]) for record in found])
        for name in found[0][pairs[0]]
    }
    return Agreement(pairs[0], series.pop(OVERALL), series)


@dataclass(frozen=True)
class Crossings:
    """How many integer weights change, layer by layer (AIT, section 4).

    Attributes:
        changed: share of a layer's integers that the recorded step changed.
        multiplier: by which gradient inundation scaled the step; 1 without it.
        moved: share that has been seen away from where it started, at any record so far.
    """

    changed: dict[str, Series]
    multiplier: dict[str, Series]
    moved: dict[str, Series]

    @property
    def never_moved(self) -> dict[str, float]:
        """Share of each layer's integers that no record saw away from their start."""
        return {path: 1 - series.values[-1] for path, series in self.moved.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the crossings as plain data."""
        return asdict(self) | {"never_moved": self.never_moved}

    def plot(self) -> Figure:
        """Draw changed shares and multipliers over time, and what never moved per layer."""
        figure, panels = _panels(3)
        for axes, lines, title in (
            (panels[0], self.changed, "share of integers changed in a step"),
            (panels[1], self.multiplier, "multiplier of the step"),
        ):
            for series in lines.values():
                axes.plot(series.steps, series.values, linewidth=0.7)
            axes.set(xlabel="step", title=title, yscale="symlog")
            smallest = min((v for s in lines.values() for v in s.values if v > 0), default=1e-6)
            axes.set_yscale("symlog", linthresh=max(smallest, 1e-9))
        panels[2].bar(range(len(self.never_moved)), list(self.never_moved.values()))
        panels[2].set(title="share that never moved", xlabel="layer", ylim=(0, 1))
        return figure


def crossings(records: Sequence[Record]) -> Crossings | None:
    """Collect what fine-tuning recorded about its integers; None where nothing was fine-tuned."""
    found = [record for record in records if isinstance(record.get("changed"), dict)]
    if not found:
        return None

    def collected(field: str) -> dict[str, Series]:
        kept = [record for record in found if field in record]
        paths = kept[0][field] if kept else {}
        return {path: _series([(r["step"], r[field][path]) for r in kept]) for path in paths}

    return Crossings(collected("changed"), collected("multiplier"), collected("moved"))


def _series(points: Sequence[tuple[int, Any]]) -> Series:
    """Order by step; a resumed run's repeated steps count once, the later record."""
    latest = {int(step): float(value) for step, value in points if value is not None}
    return Series(tuple(sorted(latest)), tuple(latest[step] for step in sorted(latest)))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * count, 3.2), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False).flat)
    for axes in panels:
        axes.grid(visible=True, alpha=0.3)
    return figure, panels
