# SPDX-License-Identifier: Apache-2.0
"""Which layer hurts? Every weight and every edge of a student, ranked, with what to do about it."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from zsq.analysis.items import Dissection, signal_to_noise
from zsq.config import Override
from zsq.functional.losses import kl_divergence
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.weight import FrozenWeight
from zsq.runtime.context import Context
from zsq.student import Student

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Images per pass.
PASS = 64
#: A suggestion is made where leaving an item out removes at least this share of the divergence.
WORTH = 0.05


@dataclass(frozen=True)
class Item:
    """One weight or edge.

    Attributes:
        kind: ``weight`` or ``edge``.
        name: path of the layer, or node whose result is quantized.
        bits: its width.
        sqnr: signal-to-quantization-noise ratio, decibels; None where there is no noise at all.
        only: divergence from the teacher when nothing else is quantized, nats.
        without: divergence when everything else is.
        clipped: share of the values outside the range; of weights, at its ends.
        unused: share of the codes that never occur; of weights, averaged over channels.
    """

    kind: str
    name: str
    bits: int
    sqnr: float | None
    only: float
    without: float
    clipped: float
    unused: float


@dataclass(frozen=True)
class Diagnosis:
    """What quantization costs, item by item.

    Attributes:
        protocol: of the student.
        divergence: KL from teacher to student, nats, averaged over images.
        images: how many were looked at.
        items: by what leaving each of them float would gain, largest first.
        overrides: of the student's recipe, which a new list of them would replace.
        planned: those of them that a bits file makes.
    """

    protocol: str
    divergence: float
    images: int
    items: tuple[Item, ...]
    overrides: tuple[Override, ...] = ()
    planned: tuple[Override, ...] = ()

    def gain(self, item: Item) -> float:
        """Return the divergence that goes away when an item is left float; negative if it helps."""
        return self.divergence - item.without

    def suggestions(self, count: int = 3) -> list[str]:
        """Return how to give the items that hurt most twice the bits, ready to be pasted.

        Options of `zsq quantize`, each of which does what those before it do, too; for what a bits file says,
        its new lines.
        """
        worst = [
            item
            for item in self.items
            if item.bits < 8 and self.gain(item) >= WORTH * self.divergence
        ][:count]
        kept = [_written(override) for override in self.overrides if override not in self.planned]
        lines = []
        for item in worst:
            if self._is_planned(item):
                section = "layers" if item.kind == "weight" else "edges"
                lines.append(f"{item.name}: {_doubled(item)}  # in bits.yaml, {section}")
            else:
                kept.append(_written(_override(item)))
                lines.append(f"--set 'overrides=[{', '.join(kept)}]'")
        return sorted(lines, key=lambda line: line.startswith("--set"))

    def _is_planned(self, item: Item) -> bool:
        """Whether a bits file says the bits of an item."""
        wanted = _override(item)
        return any((o.match, o.edge) == (wanted.match, wanted.edge) for o in self.planned)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain data, for JSON."""
        items = [asdict(item) | {"gain": self.gain(item)} for item in self.items]
        return asdict(self) | {
            "items": items, "overrides": _plain(self.overrides), "planned": _plain(self.planned),
            "suggestions": self.suggestions(),
        }  # fmt: skip

    def plot(self) -> Figure:
        """Draw the gain of the items that hurt most."""
        from matplotlib.figure import Figure

        shown = self.items[:25][::-1]
        figure = Figure(figsize=(7, 0.6 + 0.24 * len(shown)), layout="constrained")
        axes = figure.subplots()
        colors = ["tab:blue" if item.kind == "weight" else "tab:orange" for item in shown]
        axes.barh(range(len(shown)), [self.gain(item) for item in shown], color=colors)
        axes.set_yticks(range(len(shown)), [item.name for item in shown], fontsize=7)
        axes.set(xlabel=f"divergence that leaving it float removes (of {self.divergence:.3g} nats)")
        axes.set_title("blue: weights, orange: activations", fontsize=8, loc="left")
        return figure


def _plain(overrides: Sequence[Override]) -> list[dict[str, Any]]:
    return [override.model_dump(exclude_none=True) for override in overrides]


def _doubled(item: Item) -> int:
    return min(2 * item.bits, 8)


def _override(item: Item) -> Override:
    """Return what gives an item twice the bits."""
    if item.kind == "weight":
        return Override(match=glob.escape(item.name), weights=_doubled(item))
    return Override(edge=glob.escape(item.name), activations=_doubled(item))


def _written(override: Override) -> str:
    """Write an override as it is typed.

    Example:
        >>> _written(Override(match="a.*", weights=8))
        '{match: "a.*", weights: 8}'
    """
    said = override.model_dump(exclude_none=True)
    parts = (f"{name}: {json.dumps(value)}" for name, value in said.items())
    return f"{{{', '.join(parts)}}}"


@torch.no_grad()
def diagnose_student(
    student: Student, network: GraphModule, images: Tensor, context: Context | None = None
) -> Diagnosis:
    """Measure what each weight and each edge of a student costs.

    Args:
        student: frozen; not changed.
        network: the float network that it was made from, see `zsq.student.prepared_network`.
        images: (N, C, H, W), normalised; 64 to 256 are enough.
        context: device and progress.

    Returns:
        The items, ranked.
    """
    context = context or Context()
    images = images.to(context.policy.device)
    parts = Dissection(student, network)
    for each in (parts.quantized, parts.float):
        context.policy.place(each)
    wanted = _logits(parts.float, images)

    def gap(candidate: Student) -> float:
        return max(float(kl_divergence(_logits(candidate, images), wanted, 1.0, "sample")), 0.0)

    seen = _Edges(parts.quantized.network)
    for part in torch.split(images, PASS):
        seen.run(part)
    names = [("weight", path) for path in student.layers()]
    names += [("edge", name) for name in student.quantizers()]
    items = []
    with context.reporter.task("diagnosis", len(names)) as task:
        for kind, name in names:
            with parts.only(kind, name) as candidate:
                only = gap(candidate)
            with parts.without(kind, name) as candidate:
                without = gap(candidate)
            facts = seen.facts(name) if kind == "edge" else _weight_facts(parts, name)
            items.append(Item(kind, name, *facts[:2], only, without, *facts[2:]))
            task.advance(1)
    items.sort(key=lambda item: item.without)
    recipe = student.recipe
    return Diagnosis(
        recipe.protocol, gap(parts.quantized), len(images), tuple(items), tuple(recipe.overrides)
    )


def _logits(student: Student, images: Tensor) -> Tensor:
    return torch.cat([student(part).double() for part in torch.split(images, PASS)])


def _weight_facts(parts: Dissection, path: str) -> tuple[int, float | None, float, float]:
    """Return bits, decibels, share at the ends of the range, share of unused codes."""
    weight = parts.quantized.layers()[path].weight
    assert isinstance(weight, FrozenWeight)
    codes = weight.codes().flatten(1)
    high = 2**weight.bits - 1
    ends = ((codes == 0) | (codes == high)).float().mean()
    used = sum(len(row.unique()) for row in codes) / len(codes)
    ratio = signal_to_noise(parts.originals[path](), weight())
    return weight.bits, _finite(ratio), float(ends), max(1 - used / (high + 1), 0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Edges(Interpreter):
    """Runs a student and adds up, per activation quantizer, what it does to its tensor."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.network = network
        self.sums: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}
        self.bits: dict[str, int] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        module = self.network.get_submodule(str(target))
        if isinstance(module, ActivationQuantizer):
            self._add(str(target).removeprefix("quantizers."), module, args[0], result)
        return result

    def _add(self, name: str, quantizer: ActivationQuantizer, x: Tensor, rounded: Tensor) -> None:
        codes = torch.round(x.float() / quantizer.scale) + quantizer.zero_point
        outside = ((codes < quantizer.low) | (codes > quantizer.high)).double().mean()
        noise = (x - rounded).double().square().mean()
        sums = torch.stack([x.double().square().mean() * len(x), noise * len(x), outside * len(x),
                            torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)])  # fmt: skip
        kept = codes.clamp(quantizer.low, quantizer.high).long().flatten()
        counts = torch.bincount(kept, minlength=2**quantizer.bits)
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.used[name] = self.used[name] + counts if name in self.used else counts
        self.bits[name] = quantizer.bits

    def facts(self, name: str) -> tuple[int, float | None, float, float]:
        """Return bits, decibels, clipped share, share of unused codes of a quantizer."""
        signal, noise, clipped, count = self.sums[name].tolist()
        ratio = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
        unused = float((self.used[name] == 0).float().mean())
        return self.bits[name], ratio, clipped / count, unused
