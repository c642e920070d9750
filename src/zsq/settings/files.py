# SPDX-License-Identifier: Apache-2.0
"""Recipe files: where they are, and what they take from those that they extend."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from zsq.errors import UsageError
from zsq.settings.yamlfiles import read_yaml

#: Groups of settings that a schedule, or the size of images, puts in the place of others, in this order.
SCHEDULES = ("large", "quick", "large_quick")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with zsq."""
    return sorted(p.name.removesuffix(".yaml") for p in files("zsq").joinpath("recipes").iterdir()
                  if p.name.endswith(".yaml"))  # fmt: skip


def read_recipe(source: str | Path, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a recipe and those that it extends; ``heirs`` extend this one."""
    text = str(source)
    asked = f"recipe {text!r}" + (f", which {heirs[-1]!r} names," if heirs else "")
    packaged = files("zsq").joinpath("recipes", f"{text}.yaml")
    if re.fullmatch(r"[\w+.-]{1,80}", text) and packaged.is_file():
        content = packaged.read_bytes()
    elif text.endswith((".yaml", ".yml")) and _is_file(Path(text)):
        content = Path(text).read_bytes()
    else:
        raise UsageError(f"{asked} is neither a YAML file nor one of {', '.join(recipe_names())}.")
    try:
        data = read_yaml(content)
    except ValueError as error:
        raise UsageError(f"recipe {text!r} is not readable YAML: {error}.") from error
    if not isinstance(data, dict):
        raise UsageError(
            f"recipe {text!r} must be a mapping of settings, not {type(data).__name__}."
        )
    _find_beside(data, Path(text).parent)
    base = data.pop("extends", None)
    if base is None:
        return data
    if text in heirs:
        raise UsageError(f"recipe {text!r} extends itself; name another recipe in `extends`.")
    return _inherited(read_recipe(str(base), (*heirs, text)), data)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name that none can have is not one."""
    try:
        return path.is_file()
    except OSError:
        return False


def _find_beside(data: dict[str, Any], folder: Path) -> None:
    """Let a recipe's file name other files beside it, wherever it is read from."""

    def found(name: object) -> object:
        beside = (
            folder / name if isinstance(name, str) and name.endswith((".yaml", ".yml")) else None
        )
        return os.path.realpath(beside) if beside is not None and _is_file(beside) else name

    if "extends" in data:
        data["extends"] = found(data["extends"])
    synthesis = mapping_at(data, "synthesis")
    if isinstance(synthesis.get("parts"), list):
        data["synthesis"] = {**synthesis, "parts": [found(part) for part in synthesis["parts"]]}


def _inherited(base: dict[str, Any], heir: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that extends another; where it names another method, its settings are new ones."""
    for part, default in (("synthesis", "genie"), ("tuning", "reconstruct")):
        old, new = (mapping_at(recipe, part).get("method") for recipe in (base, heir))
        if new is not None and new != (old or default):
            base = {name: value for name, value in base.items() if name != part}
            for group in SCHEDULES:
                changes = mapping_at(base, group).items()
                base[group] = {k: v for k, v in changes if not str(k).startswith(f"{part}.")}
    return _merged(base, heir)


def mapping_at(data: dict[str, Any], key: str) -> dict[str, Any]:
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
