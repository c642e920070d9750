# SPDX-License-Identifier: Apache-2.0
"""The settings that recipes are made of: bits, how images come about, how the student learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator, Field

from zsq.settings.base import Bits, Crop, Override, Part, to_bits
from zsq.settings.synthesis import GeneratorSynthesis, GenieSynthesis, PixelLosses, PixelSynthesis
from zsq.settings.tuning import (
    Calibration,
    Finetuning,
    Inundation,
    Losses,
    Promotion,
    RangeCalibration,
    Reconstruction,
)

__all__ = [
    "Bits", "Calibration", "Crop", "Finetuning", "GeneratorSynthesis", "GenieSynthesis",
    "Inundation", "Losses", "Override", "Part", "PixelLosses", "PixelSynthesis",
    "Promotion", "RangeCalibration", "Reconstruction", "Synthesis", "Tuning", "to_bits",
]  # fmt: skip


def _with_method(default: str) -> Callable[[object], object]:
    """Let settings that do not name their method mean the default one."""

    def fill(value: object) -> object:
        return {"method": default, **value} if isinstance(value, dict) else value

    return fill


Synthesis = Annotated[
    Annotated[GenieSynthesis | GeneratorSynthesis | PixelSynthesis, Field(discriminator="method")],
    BeforeValidator(_with_method("genie")),
]
Tuning = Annotated[
    Annotated[Reconstruction | Finetuning | RangeCalibration, Field(discriminator="method")],
    BeforeValidator(_with_method("reconstruct")),
]
