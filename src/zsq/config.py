# SPDX-License-Identifier: Apache-2.0
"""Recipes: a method is data.

A recipe names a protocol, a synthesiser, a tuner and their settings. Recipes are YAML files in
``zsq/recipes``; the same object comes from Python, from a file, or from ``--set KEY=VALUE``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib.resources import files
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
    title: str = ""
    paper: str = ""
    protocol: Literal["edges-8bit", "integer", "all-low-bit"] = "edges-8bit"
    bits: Annotated[Bits, BeforeValidator(to_bits)] = Bits()
    overrides: tuple[Override, ...] = ()
    fold_batch_norm: bool = True
    """Fold batch norms before tuning; ``integer`` always does."""
    equalize: float = Field(default=0.5, ge=0, le=1)
    """Cross-layer equalization (arXiv 1906.04721) before quantizers are put in: 0 off, 1 full."""
    synthesis: Synthesis = GenieSynthesis()
    tuning: Tuning = Reconstruction()
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


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with zsq."""
    return sorted(p.name.removesuffix(".yaml") for p in files("zsq").joinpath("recipes").iterdir()
                  if p.name.endswith(".yaml"))  # fmt: skip


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
    data = source.model_dump() if isinstance(source, Recipe) else _read(source)
    quick = schedule == "quick"
    for part, wanted in (("large", large), ("quick", quick), ("large_quick", large and quick)):
        changed = data.get(part) if wanted else None
        for key, value in changed.items() if isinstance(changed, dict) else ():
            _assign(data, str(key), value)
    for key, value in changes.items():
        if value is not None:
            data[key] = value
    for setting in settings:
        field = setting.partition("=")[0].partition(".")[0].strip()
        if changes.get(field) is not None:
            raise UsageError(
                f"{field} is given twice, as {str(changes[field])[:60]!r} and by --set {setting!r}; leave one of "
                "them out."
            )
        _apply(data, setting)
    _fill_in_parts(data, schedule, large)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
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
        named = load_recipe(part, schedule=schedule, large=large).synthesis
        if isinstance(named, MixedSynthesis):
            raise UsageError(
                f"synthesis.parts names recipe {part!r}, whose images are mixed themselves; name its "
                "parts instead."
            )
        filled.append(named.model_dump())
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
    given = repr(first.get("input"))
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


def _read(source: str | Path, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a recipe and those that it extends; ``heirs`` extend this one."""
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
        raise UsageError(f"recipe {text!r} is not readable YAML: {yaml_problem(error)}.") from error
    if not isinstance(data, dict):
        raise UsageError(
            f"recipe {text!r} must be a mapping of settings, not {type(data).__name__}."
        )
    base = data.pop("extends", None)
    if base is None:
        return data
    if text in heirs:
        raise UsageError(f"recipe {text!r} extends itself; name another recipe in `extends`.")
    return _inherited(_read(str(base), (*heirs, text)), data)


def _inherited(base: dict[str, Any], heir: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that extends another; where it names another method, its settings are new ones."""
    for part, default in (("synthesis", "genie"), ("tuning", "reconstruct")):
        old, new = (_mapping(recipe, part).get("method") for recipe in (base, heir))
        if new is not None and new != (old or default):
            base = {name: value for name, value in base.items() if name != part}
            for group in ("quick", "large", "large_quick"):
                changes = _mapping(base, group).items()
                base[group] = {k: v for k, v in changes if not str(k).startswith(f"{part}.")}
    return _merged(base, heir)


def _mapping(data: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the settings at a key; none where something else stands there, which validation names."""
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(dict(below or {}), value) if both else value
    return merged


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
