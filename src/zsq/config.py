# SPDX-License-Identifier: Apache-2.0
"""Recipes: a method is data.

A recipe names a protocol, a synthesiser, a tuner and their settings. Recipes are YAML files in
``zsq/recipes``; the same object comes from Python, from a file, or from ``--set KEY=VALUE``.
"""

from __future__ import annotations

import copy
import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from zsq.errors import UsageError, yaml_problem
from zsq.settings import (
    Bits,
    Finetuning,
    GeneratorSynthesis,
    GenieSynthesis,
    Inundation,
    Losses,
    MixedSynthesis,
    Override,
    Part,
    PixelSynthesis,
    Promotion,
    RangeCalibration,
    Reconstruction,
    Synthesis,
    Tuning,
    to_bits,
)
from zsq.settings.files import SCHEDULES, mapping_at, read_recipe, recipe_names

__all__ = [
    "LARGE_SIDE", "Bits", "Finetuning", "GeneratorSynthesis", "GenieSynthesis", "Inundation", "Losses",
    "MixedSynthesis", "Override", "PixelSynthesis", "Promotion", "RangeCalibration", "Recipe", "Reconstruction",
    "is_large", "load_recipe", "recipe_names", "to_yaml",
]  # fmt: skip


#: Sides from here on are large: recipes apply what was published for ImageNet.
LARGE_SIDE = 128


def is_large(input_shape: tuple[int, ...]) -> bool:
    """Whether images of a shape (C, H, W) are large.

    Example:
        >>> is_large((3, 32, 32)), is_large((3, 224, 224))
        (False, True)
    """
    return max(input_shape[1:]) >= LARGE_SIDE


class Recipe(Part):
    """Everything that defines a run, apart from the model and the machine."""

    name: str = "custom"
    """Of the recipe, in tables and reports."""
    title: str = ""
    """What it does, in a line."""
    paper: str = ""
    """Where it was published."""
    protocol: Literal["edges-8bit", "integer", "all-low-bit"] = "edges-8bit"
    """Which layers and tensors are quantized: edges-8bit, integer or all-low-bit (`zsq inspect` shows all three)."""
    bits: Annotated[Bits, BeforeValidator(to_bits)] = Bits()
    """Widths of weights and activations, such as w4a4; 2 to 8 each."""
    overrides: tuple[Override, ...] = ()
    """Other widths for layers (``match``, a glob on their path) or tensors (``edge``, on their name); the last that
    matches counts."""
    fold_batch_norm: bool = True
    """Fold batch norms before tuning; ``integer`` always does."""
    equalize: float = Field(default=0.5, ge=0, le=1)
    """Cross-layer equalization (arXiv 1906.04721) before quantizers are put in: 0 off, 1 full."""
    synthesis: Synthesis = GenieSynthesis()
    """How images are made."""
    tuning: Tuning = Reconstruction()
    """How the student is tuned on them."""
    quick: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``--schedule quick``, by dotted key."""
    large: dict[str, Any] = Field(default_factory=dict)
    """Settings for images of 128 pixels and more, by dotted key: the published ones for ImageNet."""
    large_quick: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``--schedule quick`` for such images, after the two others."""


_METHODS = {"genie", "generator", "pixels", "mixed", "reconstruct", "finetune", "calibrate"}


def _without_methods(place: tuple[str, ...]) -> tuple[str, ...]:
    """Drop the methods' names, which a validator puts behind ``synthesis``, ``tuning`` and a part's index."""
    pairs = zip(("", *place), place, strict=False)
    chosen = ("synthesis", "tuning")
    return tuple(
        name for before, name in pairs
        if not (name in _METHODS and (before in chosen or before.isdigit()))
    )  # fmt: skip


def load_recipe(
    source: str | Path | Recipe,
    *,
    schedule: Literal["quick", "full"] = "full",
    large: bool = False,
    settings: Iterable[str] = (),
    **changes: object,
) -> Recipe:
    """Read a recipe and apply changes to it.

    Args:
        source: a recipe's name, a YAML file, or a Recipe.
        schedule: ``full`` is the published one; ``quick`` applies the recipe's ``quick`` settings.
        large: apply the recipe's settings for large images.
        settings: ``KEY=VALUE`` texts with dotted keys, e.g. ``tuning.steps=500``.
        changes: top-level fields, e.g. ``bits="w4a4"``; None leaves a field alone. What they change,
            ``settings`` may not.

    Returns:
        The resolved recipe.

    Raises:
        UsageError: no such recipe, a key that does not exist, a value out of range, or one field given
            twice.

    Example:
        >>> load_recipe("genie", settings=["tuning.steps=7"]).tuning.steps
        7
    """
    if schedule not in ("quick", "full"):
        raise UsageError(f"schedule {schedule!r} is neither quick nor full.")
    settings = [settings] if isinstance(settings, str) else settings
    if isinstance(source, Recipe):
        data = source.model_dump()
    else:
        data = read_recipe(source)
        _check_schedules(data)
    quick = schedule == "quick"
    for group, wanted in zip(SCHEDULES, (large, quick, large and quick), strict=True):
        if wanted:
            _put_in_place(data, group)
    for key, value in changes.items():
        if value is not None:
            data[key] = value
    _apply_all(data, settings, changes)
    _fill_in_parts(data, schedule, large)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _complaint(error) from error


def _apply_all(data: dict[str, Any], settings: Iterable[str], changes: dict[str, object]) -> None:
    """Carry out every ``--set``, none of which may be of what is given otherwise or is settled."""
    for setting in settings:
        field = setting.partition("=")[0].partition(".")[0].strip()
        if field in SCHEDULES:
            raise UsageError(
                f"--set {setting!r} changes what a schedule would set, which is done already; set its fields "
                "themselves, as in --set tuning.steps=500."
            )
        if changes.get(field) is not None:
            raise UsageError(
                f"{field} is given twice, as {str(changes[field])[:60]!r} and by --set {setting!r}; leave one of "
                "them out."
            )
        _apply(data, setting)


def _put_in_place(data: dict[str, Any], group: str) -> None:
    for key, value in mapping_at(data, group).items():
        _assign(data, str(key), value)


def _check_schedules(data: dict[str, Any]) -> None:
    """Name a setting that does not exist in a schedule that is not asked for: its author may never ask for it."""
    for groups in (("large",), ("quick",), SCHEDULES):
        tried = copy.deepcopy(data)
        try:
            for group in groups:
                _put_in_place(tried, group)
            _fill_in_parts(tried, "full", False)
            Recipe.model_validate(tried)
        except UsageError:
            continue  # what else is wrong is named where it is asked for, unless that sets it right
        except ValidationError as error:
            if error.errors()[0]["type"] == "extra_forbidden":
                raise _complaint(error) from error


def _fill_in_parts(data: dict[str, Any], schedule: Literal["quick", "full"], large: bool) -> None:
    """Put a recipe's synthesis where mixed images name the recipe."""
    synthesis = data.get("synthesis")
    if not isinstance(synthesis, dict) or not isinstance(synthesis.get("parts"), list | tuple):
        return
    filled = []
    for part in synthesis["parts"]:
        if not isinstance(part, str):
            filled.append(part)
            continue
        if mapping_at(read_recipe(part), "synthesis").get("parts"):  # perhaps of itself
            raise UsageError(
                f"synthesis.parts names recipe {part!r}, whose images are mixed themselves; name its "
                "parts instead."
            )
        filled.append(load_recipe(part, schedule=schedule, large=large).synthesis.model_dump())
    data["synthesis"] = {**synthesis, "parts": filled}


def _complaint(error: ValidationError) -> UsageError:
    """Say what is wrong with the first of the settings that cannot be."""
    first = error.errors()[0]
    place = tuple(map(str, first["loc"]))
    key = ".".join(_without_methods(place))
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place[-1], _fields(place[:-1]), n=1)
        meant = ".".join((*_without_methods(place[:-1]), *close))
        reason = "there is no such setting" + (f" (did you mean {meant!r}?)" if close else "")
    else:
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    value = first.get("input")
    given = repr(value) if isinstance(value, str | int | float) else reprlib.repr(value)
    shown = given if len(given) <= 100 else f"{given[:100]}..."
    return UsageError(
        f"recipe setting {key!r} (={shown}): {reason}; `zsq recipes NAME` lists every "
        "setting with its meaning."
    )


def _fields(place: tuple[str, ...]) -> list[str]:
    """Return the names of the settings in the group at a place of a validation error."""
    groups: list[type[BaseModel]] = [Recipe]
    for part in place:
        chosen = [
            g for g in groups if part == getattr(g.model_fields.get("method"), "default", None)
        ]
        below = [
            group for above in groups if part in above.model_fields
            for group in _groups_in(above.model_fields[part].annotation)
        ]  # fmt: skip
        groups = chosen or below or groups  # an index leaves them as they are
    return [name for group in groups for name in group.model_fields]


def _groups_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for inner in get_args(annotation) for group in _groups_in(inner)]


def _apply(data: dict[str, Any], setting: str) -> None:
    """Carry out one ``--set KEY=VALUE``."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise UsageError(f"--set {setting!r} is not of the form KEY=VALUE, e.g. tuning.steps=500.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = yaml_problem(error)
        raise UsageError(
            f"--set {setting!r}: the value is not readable YAML: {problem}."
        ) from error
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
