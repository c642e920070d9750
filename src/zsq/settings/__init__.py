# SPDX-License-Identifier: Apache-2.0
"""The settings that recipes are made of: bits, how images come about, how the student learns."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from zsq.settings.base import Bits, Crop, Override, Part, to_bits, with_method
from zsq.settings.synthesis import (
    GeneratorSynthesis,
    GenieSynthesis,
    MixedSynthesis,
    OneSynthesis,
    PixelLosses,
    PixelSynthesis,
)
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
    "Inundation", "Losses", "MixedSynthesis", "OneSynthesis", "Override", "Part", "PixelLosses",
    "PixelSynthesis", "Promotion", "RangeCalibration", "Reconstruction", "Synthesis", "Tuning", "to_bits",
]  # fmt: skip


Synthesis = Annotated[
    Annotated[
        GenieSynthesis | GeneratorSynthesis | PixelSynthesis | MixedSynthesis,
        Field(discriminator="method"),
    ],
    BeforeValidator(with_method("genie")),
]
Tuning = Annotated[
    Annotated[Reconstruction | Finetuning | RangeCalibration, Field(discriminator="method")],
    BeforeValidator(with_method("reconstruct")),
]
