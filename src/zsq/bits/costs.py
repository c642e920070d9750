# SPDX-License-Identifier: Apache-2.0
"""What bits cost: storage, bit operations, time; and budgets as a person writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zsq.errors import UsageError
from zsq.export.operators import stored_bits

CostKind = Literal["average", "size", "bops", "latency"]

_UNITS: dict[str, tuple[CostKind, float]] = {
    "": ("average", 1.0), "b": ("size", 1.0), "kb": ("size", 1e3), "mb": ("size", 1e6),
    "gb": ("size", 1e9), "mbop": ("bops", 1e6), "gbop": ("bops", 1e9), "tbop": ("bops", 1e12),
    "ms": ("latency", 1.0),
}  # fmt: skip
_SHOWN: dict[CostKind, tuple[str, float]] = {
    "average": ("average bits per weight, free layers", 1.0),
    "size": ("MB of weights in the ONNX file", 1e6), "bops": ("GBOP an image", 1e9),
    "latency": ("ms an image", 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class LayerFacts:
    """What a layer's cost depends on.

    Attributes:
        weights: number of weights.
        macs: multiply-accumulates of one image.
        input_bits: of the tensor it reads; 32 where that is float.
        milliseconds: the layer's share of a run of the whole network, per bit-width, where it was
            measured (`zsq.bits.latency`).
        depthwise: whether it is a depthwise convolution.
    """

    weights: int
    macs: int
    input_bits: int
    milliseconds: Mapping[int, float] | None = None
    depthwise: bool = False


@dataclass(frozen=True)
class Budget:
    """A bound on a cost.

    Attributes:
        kind: ``average`` bits per weight, ``size`` in bytes of weights as the ONNX file stores them
            (see `stored_bytes`; scales, biases and the graph come on top), ``bops`` bit operations
            of one image (multiply-accumulates times both bit-widths), or ``latency`` in
            milliseconds: one image on one thread of ONNX Runtime, added up from the layers' shares.
        amount: the bound.
    """

    kind: CostKind
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``4.0`` (bits per weight), ``1.7MB``, ``2.5GBOP`` or ``1.3ms``.

        Raises:
            UsageError: not of that form, or not positive.

        Example:
            >>> Budget.parse("1.5 MB")
            Budget(kind='size', amount=1500000.0)
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
        unit = match[2].lower() if match else ""
        if unit.endswith("ops"):
            unit = unit.removesuffix("s")
        if not match or unit not in _UNITS or float(match[1]) <= 0:
            raise UsageError(
                f"budget {text!r} is not an average like 4.0 (bits per weight), a size like 1.7MB, bit "
                "operations like 2.5GBOP, or a time like 1.3ms."
            )
        kind, factor = _UNITS[unit]
        return cls(kind, float(match[1]) * factor)

    def __str__(self) -> str:
        text = {
            "average": f"{self.amount:g} bits per weight", "size": f"{self.amount / 1e6:.4g} MB",
            "bops": f"{self.amount / 1e9:.4g} GBOP", "latency": f"{self.amount:.4g} ms",
        }  # fmt: skip
        return text[self.kind]


def stored_bytes(weights: int, bits: int, *, depthwise: bool = False) -> int:
    """Return the bytes that weights of a bit-width take in an ONNX file: INT4 up to 4 bits, INT8 above.

    Those of depthwise layers are INT8 at every width (`zsq.export.operators.stored_bits`).
    ``student.safetensors`` packs weights to their own width and may be smaller.

    Example:
        >>> [stored_bytes(1000, bits) for bits in (2, 4, 5, 8)]
        [500, 500, 1000, 1000]
    """
    return -(-weights * stored_bits(bits, depthwise=depthwise) // 8)


def cost_of(facts: LayerFacts, bits: int, kind: CostKind) -> float:
    """Return a layer's cost at a bit-width; for ``average`` its weights' bits.

    Raises:
        UsageError: latency was not measured.

    Example:
        >>> cost_of(LayerFacts(1000, 64000, 4), 2, "bops")
        512000.0
    """
    if kind == "average":
        return float(facts.weights * bits)
    if kind == "size":
        return float(stored_bytes(facts.weights, bits, depthwise=facts.depthwise))
    if kind == "bops":
        return float(facts.macs * bits * facts.input_bits)
    if facts.milliseconds is None:
        raise UsageError(
            "a budget in milliseconds needs latencies that were measured (zsq.bits.latency)."
        )
    return facts.milliseconds[bits]


def cost_label(kind: CostKind) -> str:
    """Say what `shown_cost` is, for an axis or a column."""
    return _SHOWN[kind][0]


def shown_cost(kind: CostKind, cost: float) -> float:
    """Return a budget's amount as people read it.

    Example:
        >>> shown_cost("size", 1_500_000)
        1.5
    """
    return cost / _SHOWN[kind][1]
