# SPDX-License-Identifier: Apache-2.0
"""What a sweep's file says, and the cells that it comes to."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from zsq.errors import UsageError
from zsq.settings import Part
from zsq.settings.yamlfiles import read_yaml

#: Options of `zsq quantize` that no sweep's file may give its cells.
_NOT_OPTIONS = ("-o", "--out", "--resume", "--no-resume", "--allow-pickle")


class Sweep(Part):
    """What a sweep file says."""

    models: tuple[str, ...] = Field(min_length=1)
    recipes: tuple[str, ...] = Field(min_length=1)
    bits: tuple[str, ...] = Field(default=("w4a4",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    schedule: Literal["quick", "full"] = "full"
    settings: tuple[str, ...] = ()
    """``KEY=VALUE`` changes, for every cell."""
    options: tuple[str, ...] = ()
    """Further options of `zsq quantize`, e.g. ``--input-shape=3,64,64``."""
    data: str | None = None
    """An ImageFolder to evaluate every cell on."""

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep file.

        Raises:
            UsageError: missing, or not a sweep.
        """
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            needs = (
                "it needs `models` and `recipes`, and may hold `bits`, `seeds`, `schedule`, `settings`, `options` "
                "and `data`"
            )
            raise UsageError(
                f"the sweep {path}: {key}: {reason}; {needs}."
                if key
                else f"the sweep {path}: {reason}."
            ) from error
        except ValueError as error:
            raise UsageError(f"the sweep {path} cannot be read: {error}.") from error

    @model_validator(mode="after")
    def _has_every_cell_once(self) -> Self:
        folders = [cell.folder for cell in self.cells()]
        twice = sorted({folder for folder in folders if folders.count(folder) > 1})
        if twice:
            raise ValueError(
                f"two cells would share the folder {twice[0]}; leave out what its lists hold twice"
            )
        return self

    @model_validator(mode="after")
    def _decides_nothing_for_its_reader(self) -> Self:
        """Models are no options, and what may run code is allowed on the command line alone."""
        for model in self.models:
            if model.startswith("-"):
                raise ValueError(f"the model {model!r} is none: it begins like an option")
        for option in self.options:
            name = option.partition("=")[0]
            if name in _NOT_OPTIONS or re.match(r"-o.", name):
                raise ValueError(
                    f"the option {option!r} is not a cell's: folders follow from the sweep's, cells are always "
                    "resumed, and --allow-pickle is given to `zsq sweep` itself"
                )
        return self

    def asks_for_gpu(self) -> bool:
        """Return whether cells run on a GPU.

        Example:
            >>> Sweep(models=("a",), recipes=("b",), options=("--device=cuda",)).asks_for_gpu()
            True
        """
        return any(option.removeprefix("--device=").startswith("cuda") for option in self.options)

    def gpus(self) -> list[str]:
        """Return this machine's GPUs that local cells may be dealt out to, as CUDA names them.

        None of them where no cell asks for a GPU, or all ask for a certain one.
        """
        if not {"--device=cuda", "cuda"} & set(self.options):
            return []
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]

    def cells(self) -> list[Cell]:
        """Return every combination."""
        return [
            Cell(*combination)
            for combination in itertools.product(self.models, self.recipes, self.bits, self.seeds)
        ]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    model: str
    recipe: str
    bits: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder.

        Example:
            >>> Cell("zsq:resnet20_cifar10", "gdfq+ait", "w4a4", 0).folder
            'zsq_resnet20_cifar10.gdfq+ait.w4a4.0'
        """
        parts = (self.model, self.recipe, self.bits, str(self.seed))
        return ".".join(re.sub(r"[^\w+-]+", "_", part).strip("_") for part in parts)
