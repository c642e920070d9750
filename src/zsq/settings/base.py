# SPDX-License-Identifier: Apache-2.0
"""What every group of settings is, bits, and what several methods share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zsq.errors import UsageError


class Part(BaseModel):
    """A frozen group of finite settings; unknown names are errors, docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Bits(Part):
    """Bits per weight and per activation, written ``w4a4``."""

    weights: int = Field(default=4, ge=2, le=8)
    activations: int = Field(default=4, ge=2, le=8)

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read the notation ``w4a4``.

        Raises:
            UsageError: the text is not of that form, or a width is outside 2..8.

        Example:
            >>> Bits.parse("w2a4").weights
            2
        """
        match = re.fullmatch(r"[wW]([2-8])[aA]([2-8])", text)
        if not match:
            raise UsageError(
                f"bits {text!r} is not of the form w4a4, with 2 to 8 bits for weights and "
                "activations."
            )
        return cls(weights=int(match[1]), activations=int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


def to_bits(value: object) -> object:
    """Read bits from text; leave what is not text to validation."""
    return value if isinstance(value, (dict, Bits)) else Bits.parse(str(value))


def with_method(default: str) -> Callable[[object], object]:
    """Let settings that do not name their method mean the default one."""

    def fill(value: object) -> object:
        return {"method": default, **value} if isinstance(value, dict) else value

    return fill


class Override(Part):
    """Bits for the layers or the tensors whose name matches a glob; the last match wins."""

    match: str | None = None
    """Glob on module paths of layers, e.g. ``*.identity_conv.*``."""
    edge: str | None = None
    """Instead of `match`: glob on names of quantized tensors, as ``zsq inspect`` lists them."""
    weights: int | None = Field(default=None, ge=2, le=8)
    activations: int | None = Field(default=None, ge=2, le=8)
    """Bits of the tensor, or of the one that the layer reads."""

    @model_validator(mode="after")
    def _names_one_thing(self) -> Self:
        if (self.match is None) == (self.edge is None):
            raise ValueError("an override needs either match, for layers, or edge, for tensors")
        if self.edge is not None and self.weights is not None:
            raise ValueError("a tensor has no weights; give them with match, the layer's path")
        return self


class Crop(Part):
    """Random resized crops, half of them mirrored."""

    probability: float = Field(default=0.5, ge=0, le=1)
    """Of a crop: per batch and step in synthesis, per image in training."""
    smallest: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the area."""
