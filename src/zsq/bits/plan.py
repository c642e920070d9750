# SPDX-License-Identifier: Apache-2.0
"""The bits file: bit-widths for the layers, and tensors between them, of one network, and why."""

from __future__ import annotations

import glob
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from torch.fx import GraphModule

from zsq.artifact.networkfile import fingerprint
from zsq.bits.costs import CostKind, stored_bytes
from zsq.bits.layers import fixed_bits
from zsq.config import Recipe
from zsq.errors import UsageError
from zsq.quantizers.protocol import place
from zsq.runtime.files import atomic_write
from zsq.settings import Bits, Override, Part
from zsq.settings.yamlfiles import read_yaml
from zsq.student import prepared_network
from zsq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT: Literal[3] = 3
Width = Annotated[int, Field(ge=2, le=8)]


class Point(Part):
    """One point of the frontier: cost in the budget's unit, and summed sensitivity."""

    cost: float
    sensitivity: float


class EdgePlan(Part):
    """Bits for the tensors between layers, chosen one by one."""

    budget: float
    """Average bits per value."""
    cost: float
    """What of it is used."""
    sensitivity: float
    exact: bool = True
    edges: dict[str, Width]
    """Bits of each tensor that was free, by the node that produces it."""
    values: dict[str, int]
    """Values of one image in each of them."""
    measured: dict[str, dict[int, float]]
    """Sensitivity of each of them at each bit-width, in nats."""
    frontier: tuple[Point, ...]
    """Points of the frontier, cheapest first."""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        apart = sorted({*self.edges} ^ {*self.values})
        if apart:
            raise ValueError(f"edges and values name different tensors: {_listed(apart)}")
        unknown = sorted({*self.edges} - {*self.measured})
        if unknown:
            raise ValueError(f"measured has no sensitivities of tensors {_listed(unknown)}")
        return self

    def overrides(self) -> tuple[Override, ...]:
        """Return the overrides that put the plan into effect."""
        return tuple(
            Override(edge=glob.escape(name), activations=bits) for name, bits in self.edges.items()
        )


class BitsPlan(Part):
    """Bits for every layer of one network; what ``zsq bits`` writes and every recipe accepts."""

    format: Literal[2, 3] = FORMAT
    """3; without `edges` 2 is the same."""
    model: str
    """What the user typed."""
    network: str
    """Hash of the network's graph and weights."""
    protocol: str
    """The protocol that the layers were free under."""
    activations: Width
    """Of all, or where `edges` chooses them one by one their rounded average."""
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
    edges: EdgePlan | None = None
    """Bits of activations, where those were chosen too."""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        apart = sorted({*self.layers} ^ {*self.weights} | {*self.free} - {*self.layers})
        if apart:
            raise ValueError(f"layers, free and weights name different layers: {_listed(apart)}")
        if not self.free:
            raise ValueError("free names no layer, though the bits of some were chosen")
        unknown = sorted({*self.free} - {*self.measured})
        if unknown:
            raise ValueError(f"measured has no sensitivities of {_listed(unknown)}")
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
        """Return the recipe's overrides with those that put the plan into effect around them.

        Activations that the recipe overrides stay as they are: the plan's come before. What it fixes
        the plan has to agree with: the name of its protocol says what first and last layers get, and
        its overrides are the user's word.

        Args:
            teacher: the network to be quantized.
            recipe: loaded with the plan's `widths` as its bits.

        Raises:
            UsageError: the plan is for another network, its protocol leaves other layers free than
                the recipe's, or the recipe's overrides fix a layer to other bits.
        """
        self.checked(teacher)
        network = prepared_network(teacher, recipe)
        self._check_names(network, recipe)
        self._check_protocol(network, recipe)
        self._check_overrides(recipe)
        edges, layers = self.of_edges(), self.of_layers()
        return (*edges, *recipe.overrides, *layers)

    def checked(self, teacher: Teacher) -> tuple[Override, ...]:
        """Return the plan's own overrides.

        Raises:
            UsageError: the plan is for another network.
        """
        if fingerprint(teacher.network) != self.network:
            raise UsageError(
                f"the bits file was made for another network ({self.model}, {len(self.layers)} layers) than "
                f"{teacher.info.reference}, or for other weights; make one with `zsq bits` for this network."
            )
        return (*self.of_edges(), *self.of_layers())

    def of_layers(self) -> tuple[Override, ...]:
        """Return the overrides that put the layers' bits into effect."""
        return tuple(
            Override(match=glob.escape(path), weights=bits) for path, bits in self.layers.items()
        )

    def of_edges(self) -> tuple[Override, ...]:
        """Return the overrides that put the bits of activations into effect, where those were chosen."""
        return self.edges.overrides() if self.edges else ()

    def _check_names(self, network: GraphModule, recipe: Recipe) -> None:
        placed = place(network, recipe.protocol, recipe.bits, recipe.overrides).weights
        if set(placed) != set(self.layers):
            raise UsageError(
                f"the bits file names other layers than the {len(placed)} that are quantized: "
                f"{_listed(sorted(set(placed) ^ set(self.layers)))}; leave the names that `zsq bits` wrote."
            )

    def _check_protocol(self, network: GraphModule, recipe: Recipe) -> None:
        """Refuse a protocol that fixes what was chosen, or leaves free what was not."""
        ours, theirs = fixed_bits(network, self.protocol), fixed_bits(network, recipe.protocol)
        apart = [path for path in self.layers if (path in ours) != (path in theirs)]
        if apart:
            raise UsageError(
                f"the bits file was made under protocol {self.protocol} and recipe {recipe.name!r} has "
                f"{recipe.protocol}, of which only one fixes the bits of {_listed(apart)}; make one with "
                f"`zsq bits MODEL --recipe {recipe.name} --protocol {recipe.protocol}`, or quantize with "
                f"`--protocol {self.protocol}`."
            )

    def _check_overrides(self, recipe: Recipe) -> None:
        """Refuse a recipe that gives a layer other bits than the plan."""
        for path, bits in self.layers.items():
            wanted = [
                o.weights
                for o in recipe.overrides
                if o.weights and o.match is not None and fnmatchcase(path, o.match)
            ]
            if wanted and wanted[-1] != bits:
                raise UsageError(
                    f"the bits file gives layer {path!r} {bits} bits and an override of recipe {recipe.name!r} "
                    f"fixes it to {wanted[-1]}; drop the override (--set 'overrides=[]'), or write it into a "
                    "recipe file and make the bits file with `zsq bits MODEL --recipe FILE`."
                )

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
            return cls.model_validate(read_yaml(path))
        except ValueError as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UsageError(
                f"{path} is not a readable bits file ({reason[:150]}); give widths like w4a4, or the "
                "bits.yaml that `zsq bits MODEL --budget ... -o FOLDER` wrote."
            ) from error


def read_plan(bits: str | Path | BitsPlan | None) -> BitsPlan | None:
    """Return a plan that is given or in a file that is named; widths like ``w4a4`` are none.

    Raises:
        UsageError: the file is not a bits file.
    """
    if bits is None or isinstance(bits, BitsPlan):
        return bits
    is_file = isinstance(bits, Path) or bits.endswith((".yaml", ".yml"))
    return BitsPlan.load(Path(bits)) if is_file else None


def _listed(paths: list[str]) -> str:
    """Name layers, a few of them where they are many."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
