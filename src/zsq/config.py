# SPDX-License-Identifier: Apache-2.0
"""Recipes: a method is data.

A recipe names a protocol, a synthesiser, a tuner and their settings. Recipes are YAML files in
``zsq/recipes``; the same object comes from Python, from a file, or from ``--set KEY=VALUE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zsq.errors import UsageError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Bits(_Part):
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


def _to_bits(value: object) -> object:
    return value if isinstance(value, (dict, Bits)) else Bits.parse(str(value))


class Override(_Part):
    """Bits for the layers whose path matches a glob; the last match wins."""

    match: str
    """Glob on module paths, e.g. ``*.identity_conv.*``."""
    weights: int | None = Field(default=None, ge=2, le=8)
    activations: int | None = Field(default=None, ge=2, le=8)
    """Bits of the tensor that the layer reads."""


class Synthesis(_Part):
    """GENIE-D (arXiv 2212.04780, section 4.1): how calibration images are made."""

    method: Literal["genie"] = "genie"
    images: int = Field(default=1024, ge=1)
    """Images to make in all; the last batch is smaller where ``batch`` does not divide them."""
    batch: int = Field(default=128, ge=2)
    """Images that share a generator and batch statistics."""
    steps: int = Field(default=4000, ge=1)
    """Optimisation steps per batch."""
    latent: int = Field(default=256, ge=1)
    """Length of each image's latent vector."""
    latent_lr: float = Field(default=0.1, gt=0)
    generator_lr: float = Field(default=0.01, gt=0)
    generator_decay: float = Field(default=0.95, gt=0, le=1)
    """Factor on the generator's rate every ``decay_every`` steps."""
    decay_every: int = Field(default=100, ge=1)
    plateau_patience: int = Field(default=100, ge=1)
    """Steps without a relatively 1e-4 better loss before the latents' rate falls to a tenth."""
    swing: bool = True
    """Shift the input of strided convolutions at random (swing convolution)."""


class Tuning(_Part):
    """GENIE-M (arXiv 2212.04780, section 4.2) and, as settings, AdaRound, BRECQ and QDrop."""

    method: Literal["reconstruct"] = "reconstruct"
    steps: int = Field(default=20000, ge=0)
    """Steps per reconstruction unit; 0 rounds to nearest."""
    batch: int = Field(default=32, ge=1)
    unit: Literal["block", "layer"] = "block"
    """What is reconstructed at a time: blocks found on the graph, or single layers."""
    drop: float = Field(default=0.5, ge=0, le=1)
    """Probability that an activation passes through unquantized (QDrop)."""
    mix: float = Field(default=0.5, ge=0, le=1)
    """Share of a unit's input elements that come from the quantized network, not the teacher."""
    quantize_activations: Literal["together", "after"] = "together"
    """Quantize activations while weights are tuned, or in a pass of its own after it (BRECQ)."""
    activation_steps: int = Field(default=0, ge=0)
    """Steps per unit of that pass; 0 calibrates the activation steps and leaves them."""
    loss_power: float = Field(default=2.0, gt=0)
    """Exponent of the reconstruction error."""
    learn_weight_scale: bool = True
    learn_activation_scale: bool = True
    scale_lr: float = Field(default=5e-3, gt=0)
    """Rate of the weight steps; relative to the step where ``log_scale``."""
    activation_lr: float = Field(default=1e-3, gt=0)
    """Rate of the activation steps; relative to the step where ``log_scale``."""
    bias_lr: float = Field(default=0.0, ge=0)
    """Rate of the biases; 0 keeps the teacher's."""
    log_scale: bool = True
    """Learn steps by their logarithm: the same relative speed in every layer."""
    rounding_lr: float | None = Field(default=None, gt=0)
    """Rate of the soft bits; None: 20 / steps, at most 0.1, so that short runs can decide them too (the
    published 1e-3 at 20,000 steps)."""
    rounding_weight: float = Field(default=1.0, ge=0)
    """Lambda: weight of the regulariser that decides the soft bits."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps before the regulariser starts."""
    beta_start: float = 20.0
    beta_end: float = 2.0
    power: float = Field(default=2.4, gt=0)
    """Exponent of the error that chooses initial steps."""
    asymmetric: bool = True
    """Let two-sided activations have an off-centre zero point."""
    calibration_images: int = Field(default=256, ge=1)
    """Images that choose the first activation steps."""


class Recipe(_Part):
    """Everything that defines a run, apart from the model and the machine."""

    name: str = "custom"
    title: str = ""
    paper: str = ""
    protocol: Literal["edges-8bit", "integer", "all-low-bit"] = "edges-8bit"
    bits: Annotated[Bits, BeforeValidator(_to_bits)] = Bits()
    overrides: tuple[Override, ...] = ()
    fold_batch_norm: bool = True
    """Fold batch norms before tuning; ``integer`` always does."""
    equalize: float = Field(default=0.5, ge=0, le=1)
    """Cross-layer equalization (arXiv 1906.04721) of folded networks: 0 off, 1 full."""
    synthesis: Synthesis = Synthesis()
    tuning: Tuning = Tuning()
    quick: dict[str, Any] = {}
    """Settings of ``--schedule quick``, by dotted key."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with zsq."""
    return sorted(p.name.removesuffix(".yaml") for p in files("zsq").joinpath("recipes").iterdir()
                  if p.name.endswith(".yaml"))  # fmt: skip


def load_recipe(
    source: str | Path | Recipe,
    *,
    schedule: Literal["quick", "full"] = "full",
    settings: Iterable[str] = (),
    **changes: object,
) -> Recipe:
    """Read a recipe and apply changes to it.

    Args:
        source: a recipe's name, a YAML file, or a Recipe.
        schedule: ``full`` is the published one; ``quick`` applies the recipe's ``quick`` settings.
        settings: ``KEY=VALUE`` texts with dotted keys, e.g. ``tuning.steps=500``.
        changes: top-level fields, e.g. ``bits="w4a4"``; None leaves a field alone.

    Returns:
        The resolved recipe.

    Raises:
        UsageError: no such recipe, a key that does not exist, or a value out of range.

    Example:
        >>> load_recipe("genie", settings=["tuning.steps=7"]).tuning.steps
        7
    """
    data = source.model_dump() if isinstance(source, Recipe) else _read(source)
    if schedule == "quick":
        quick = data.get("quick")
        for key, value in quick.items() if isinstance(quick, dict) else ():
            _assign(data, str(key), value)
    for key, value in changes.items():
        if value is not None:
            data[key] = value
    for setting in settings:
        _apply(data, setting)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise UsageError(
            f"recipe setting {key!r} (={first.get('input')!r}): {reason}. "
            "`zsq recipes NAME` lists every setting with its meaning."
        ) from error


def _read(source: str | Path) -> dict[str, Any]:
    text = str(source)
    packaged = files("zsq").joinpath("recipes", f"{text}.yaml")
    if re.fullmatch(r"[\w+.-]+", text) and packaged.is_file():
        content = packaged.read_bytes()
    elif text.endswith((".yaml", ".yml")) and Path(text).is_file():
        content = Path(text).read_bytes()
    else:
        raise UsageError(
            f"recipe {text!r} is neither a YAML file nor one of {', '.join(recipe_names())}."
        )
    try:
        data = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {text!r} is not readable YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(
            f"recipe {text!r} must be a mapping of settings, not {type(data).__name__}."
        )
    return data


def _apply(data: dict[str, Any], setting: str) -> None:
    """Carry out one ``--set KEY=VALUE``."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise UsageError(f"--set {setting!r} is not of the form KEY=VALUE, e.g. tuning.steps=500.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting!r}: the value is not readable YAML: {error}") from error
    _assign(data, key.strip(), value)


def _assign(data: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key; unknown keys are left for validation to name."""
    *parents, last = key.split(".")
    place: dict[str, Any] = data
    for part in parents:
        child = place.setdefault(part, {})
        if not isinstance(child, dict):
            raise UsageError(f"recipe setting {key!r}: {part!r} holds a value, not settings.")
        place = child
    place[last] = value


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_recipe` reads back."""
    data = recipe.model_dump(mode="json")
    data["bits"] = str(recipe.bits)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
