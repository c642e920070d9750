# SPDX-License-Identifier: Apache-2.0
"""Settings of how images come about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from zsq.settings.base import Crop, Part, with_method


class GenieSynthesis(Part):
    """GENIE-D (arXiv 2212.04780, section 4.1): how calibration images are made."""

    method: Literal["genie"] = "genie"
    images: int = Field(default=1024, ge=1)
    """Images to make in all; where ``batch`` does not divide them batches are smaller, all about as large."""
    batch: int = Field(default=128, ge=2)
    """Images that share a generator and batch statistics."""
    parallel: int | None = Field(default=None, ge=1)
    """Batches in flight side by side: speed where one does not fill the device, nothing else. None: on a
    GPU as many as fill it, measured, elsewhere one."""
    steps: int = Field(default=4000, ge=1)
    """Optimisation steps per batch."""
    latent: int = Field(default=256, ge=1)
    """Length of each image's latent vector."""
    latent_lr: float = Field(default=0.1, gt=0)
    """Rate of the latents (Adam)."""
    generator_lr: float = Field(default=0.01, gt=0)
    """Rate of the generator (Adam)."""
    generator_decay: float = Field(default=0.95, gt=0, le=1)
    """Factor on the generator's rate every ``decay_every`` steps."""
    decay_every: int = Field(default=100, ge=1)
    """Steps between two of these."""
    plateau_patience: int = Field(default=100, ge=1)
    """Steps without a relatively 1e-4 better loss before the latents' rate falls to a tenth."""
    swing: bool = True
    """Shift the input of strided convolutions at random (swing convolution)."""


class GeneratorSynthesis(Part):
    """A conditional generator that learns from the teacher (GDFQ, Qimera, AutoReCon).

    Fine-tuning goes on training it: every batch that the student sees is new.
    """

    method: Literal["generator"] = "generator"
    generator: Literal["gdfq", "qimera", "autorecon"] = "gdfq"
    """Whose generator, and what it learns from: GDFQ's, Qimera's or AutoReCon's."""
    images: int = Field(default=1024, ge=1)
    """Images that are drawn from the finished generator and kept with the run."""
    steps: int = Field(default=800, ge=1)
    """Warm-up: steps of the generator before the student starts to learn."""
    batch: int = Field(default=200, ge=2)
    """Images per step, of generator and student."""
    latent: int | None = Field(default=100, ge=1)
    """Length of the noise; None: of the teacher's last feature (Qimera)."""
    conditional: bool = False
    """The class enters through conditional batch norms (ImageNet) instead of an embedding."""
    lr: float = Field(default=1e-3, gt=0)
    """Rate of Adam; divided by ten wherever the student's is."""
    statistics_weight: float = Field(default=0.1, ge=0)
    """Weight of the batch norm distance beside the cross-entropy."""
    superpose: float = Field(default=0.0, ge=0, le=1)
    """Probability that a batch is made of mixtures of classes (Qimera)."""
    mixed: int = Field(default=2, ge=1)
    """Classes per mixture."""
    embedding: Literal["random", "classifier"] = "random"
    """Where the label embedding starts: at random, or at the rows of the teacher's classifier."""
    disentangle: int | None = Field(default=None, ge=1)
    """Width of the linear map on the embedding (disentanglement mapping); None: no map."""
    norm_as_released: bool = False
    """Normalise mixtures as Qimera's public code does, over the batch and divided by their number."""
    architecture: str = "published"
    """AutoReCon's cells: ``published``, ``search``, or a file that a search saved."""
    search_steps: int = Field(default=20000, ge=1)
    """Steps of a search, where one is asked for."""


class PixelLosses(Part):
    """Weights of the terms that pixels are optimised for; 0 leaves a term out."""

    image_statistics: float = Field(default=0.0, ge=0)
    """Every image's mean and standard deviation against the batch norms' (ZeroQ)."""
    batch_statistics: float = Field(default=0.0, ge=0)
    """The batch's mean and variance against the batch norms' (IntraQ, HAST)."""
    cross_entropy: float = Field(default=0.0, ge=0)
    """With random labels, weighted by ``difficulty`` (HAST)."""
    soft_target: float = Field(default=0.0, ge=0)
    """The label's probability against a random wanted one (soft inception, IntraQ)."""
    class_band: float = Field(default=0.0, ge=0)
    """The distance of pooled features to their class centre, kept within ``band`` (IntraQ)."""


class PixelSynthesis(Part):
    """Images whose pixels are optimised (ZeroQ, IntraQ, HAST)."""

    method: Literal["pixels"] = "pixels"
    images: int = Field(default=5120, ge=1)
    """Images to make in all; where ``batch`` does not divide them batches are smaller, all about as large."""
    batch: int = Field(default=256, ge=2)
    """Images that share batch statistics."""
    parallel: int | None = Field(default=None, ge=1)
    """Batches in flight side by side, as in `GenieSynthesis`. Where ``class_band`` has weight, always one:
    a batch's class centres come from all batches before it."""
    steps: int = Field(default=1000, ge=1)
    """Optimisation steps per batch."""
    lr: float = Field(default=0.5, gt=0)
    """Rate of Adam."""
    plateau_patience: int = Field(default=50, ge=1)
    """Steps without a relatively 1e-4 better loss before the rate falls to a tenth."""
    init_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the noise that pixels start from."""
    init_slope: float = Field(default=0.0, ge=0, le=4)
    """How fast that noise's amplitudes fall with frequency, ``frequency**-slope``: 0 is white, photographs have
    1 or more. Where it is not 0 take a smaller ``lr``, or the optimiser's first steps are the noise."""
    losses: PixelLosses = PixelLosses(batch_statistics=1.0)
    """Weights of the loss's terms."""
    difficulty: float = Field(default=0.0, ge=0)
    """Gamma of ``(1 - p)**gamma * CE``; 0 is the plain cross-entropy."""
    soft_floor: float = Field(default=1.0, gt=0, le=1)
    """Half of the wanted probabilities are drawn from here to 1, the others are 1."""
    band: tuple[float, float] = (0.0, 2.0)
    """Smallest and largest cosine distance to the class centre."""
    crop: Crop | None = None
    """Augmentation inside the loop."""

    @field_validator("band")
    @classmethod
    def _is_a_band(cls, band: tuple[float, float]) -> tuple[float, float]:
        low, high = band
        if not 0 <= low <= high <= 2:
            raise ValueError(
                "a band is a smallest and a largest cosine distance, 0 to 2, in this order"
            )
        return band


OneSynthesis = Annotated[
    Annotated[GenieSynthesis | GeneratorSynthesis | PixelSynthesis, Field(discriminator="method")],
    BeforeValidator(with_method("genie")),
]


class MixedSynthesis(Part):
    """Images of several methods in one set, in equal shares.

    Images of one method may share its blind spots.
    """

    method: Literal["mixed"] = "mixed"
    images: int = Field(default=1024, ge=1)
    """Images to make in all; every part makes its share, whatever its own number says."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of every part; None: each its own."""
    batch: int | None = Field(default=None, ge=2)
    """Batch of every part; None: each its own."""
    parts: tuple[OneSynthesis, ...] = Field(min_length=1)
    """How each share is made: settings, or the name of a recipe whose synthesis it is. A part that is
    named twice makes two shares."""

    @model_validator(mode="before")
    @classmethod
    def _deal_out(cls, values: object) -> object:
        """Give every part its share of the images, and the steps and the batch where they are given."""
        if not isinstance(values, Mapping) or not isinstance(values.get("parts"), list | tuple):
            return values
        parts, images = values["parts"], values.get("images", cls.model_fields["images"].default)
        if not isinstance(images, int) or images < len(parts):
            return values
        common = {name: values[name] for name in ("steps", "batch") if values.get(name) is not None}
        dealt = []
        for index, part in enumerate(parts):
            share = images // len(parts) + (index < images % len(parts))
            own = part.model_dump() if isinstance(part, Part) else part
            dealt.append({**own, **common, "images": share} if isinstance(own, dict) else own)
        return {**values, "parts": dealt}

    @model_validator(mode="after")
    def _enough(self) -> MixedSynthesis:
        if self.images < len(self.parts):
            raise ValueError(
                f"images is {self.images}, fewer than the {len(self.parts)} parts that share them"
            )
        return self
