# SPDX-License-Identifier: Apache-2.0
"""AutoReCon's search space: three cells, each edge with a choice of operations, as data.

A cell computes ``n0 = up_a(in)``, ``n1 = up_b(in)``, ``n2 = o0(n0) + o1(n1)`` and
``n3 = o2(n0) + o3(n1) + o4(n2)``. The second and third cell also receive the nodes ``p0 .. p2`` of
the one before: ``n2 += x0(p0) + x1(p1) + x2(p2)`` and ``n3 += x3(p0) + x4(p1) + x5(p2)``.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from zsq.config import is_large
from zsq.errors import UsageError
from zsq.runtime.files import atomic_write
from zsq.settings.yamlfiles import read_yaml

UPS = ("N", "L")
OPERATIONS = ("0", "s", "c1", "c3", "c5", "d3", "d5")
CROSSES = ("0", "N", "L")
#: What the libraries call the networks of `published_architectures`, where it is not the table's name:
#: torchvision; pytorchcv and timm, whose suffixes are the width.
ALIASES = {
    "mobilenet_v2": "mobilenetv2",
    "mobilenetv2_w1": "mobilenetv2",
    "mobilenetv2_100": "mobilenetv2",
}


@dataclass(frozen=True)
class Cell:
    """The choices of one cell.

    Attributes:
        ups: two of `UPS` (nearest, bilinear).
        operations: five of `OPERATIONS` (none, skip, convolutions, dilated convolutions).
        crosses: six of `CROSSES`, or none in the first cell.
    """

    ups: tuple[str, ...]
    operations: tuple[str, ...]
    crosses: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read the notation ``NN; d5 0 d5 d3 c5; 0 0 L 0 0 N``.

        Raises:
            UsageError: not of that form, or an edge that does not exist.

        Example:
            >>> str(Cell.parse("LN; d5 d5 c1 c5 d3; N N N L L L"))
            'LN; d5 d5 c1 c5 d3; N N N L L L'
        """
        parts = [part.split() for part in text.split(";")]
        ups = tuple("".join(parts[0]))
        operations = tuple(parts[1]) if len(parts) > 1 else ()
        crosses = tuple(parts[2]) if len(parts) > 2 else ()
        rules = ((ups, UPS, (2,)), (operations, OPERATIONS, (5,)), (crosses, CROSSES, (0, 6)))
        for chosen, allowed, counts in rules:
            unknown = [each for each in chosen if each not in allowed]
            if unknown or len(chosen) not in counts or len(parts) > 3:
                raise UsageError(
                    f"the cell {text!r} is not of the form 'NN; d5 0 d5 d3 c5; 0 0 L 0 0 N': two of "
                    f"{'/'.join(UPS)}, five of {'/'.join(OPERATIONS)}, none or six of "
                    f"{'/'.join(CROSSES)}."
                )
        return cls(ups, operations, crosses)

    def __str__(self) -> str:
        parts = ["".join(self.ups), " ".join(self.operations), " ".join(self.crosses)]
        return "; ".join(part for part in parts if part)

    def feeds(self, node: int) -> bool:
        """Whether anything but zeros reaches node 2 or 3."""
        second = any(x != "0" for x in (*self.operations[:2], *self.crosses[:3]))
        third = any(x != "0" for x in (*self.operations[2:4], *self.crosses[3:]))
        return second if node == 2 else third or (second and self.operations[4] != "0")


@dataclass(frozen=True)
class Architecture:
    """A generator of the search space: three cells."""

    cells: tuple[Cell, Cell, Cell]

    @classmethod
    def parse(cls, texts: Any) -> Architecture:
        """Read three cells in `Cell`'s notation.

        Raises:
            UsageError: not three cells, crosses where there are none, or no way to the image.
        """
        three = isinstance(texts, (list, tuple)) and len(texts) == 3
        if not three or not all(isinstance(text, str) for text in texts):
            raise UsageError(
                f"an architecture is a list of three cells, each a text, not {reprlib.repr(texts)}."
            )
        first, second, third = (Cell.parse(text) for text in texts)
        if first.crosses or not second.crosses or not third.crosses:
            raise UsageError(
                f"the architecture {list(texts)} needs crosses in its second and third cell only."
            )
        for cell in (first, second, third):
            if not cell.feeds(3):
                raise UsageError(
                    f"nothing reaches the output of the cell {str(cell)!r}; choose at least one of "
                    "its edges other than 0."
                )
        return cls((first, second, third))

    def save(self, path: Path) -> None:
        """Write a YAML file that `load` reads."""
        with atomic_write(path) as temporary:
            Path(temporary).write_text(yaml.safe_dump([str(c) for c in self.cells]), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """Read what `save` wrote.

        Raises:
            UsageError: unreadable, or not an architecture.
        """
        try:
            content = read_yaml(path)
        except ValueError as error:
            raise UsageError(
                f"the architecture {path} cannot be read ({str(error)[:120]}); use published, search, "
                "or a file that a search saved."
            ) from error
        return cls.parse(content)


def published_architectures() -> dict[str, Architecture]:
    """Return the discovered generators (AutoReCon, arXiv 2105.12151) by teacher."""
    text = files("zsq").joinpath("synthesis", "architectures.yaml").read_text("utf-8")
    return {name: Architecture.parse(cells) for name, cells in yaml.safe_load(text).items()}


def default_architecture(image_shape: tuple[int, ...], reference: str) -> Architecture:
    """Return the published generator for a teacher.

    The one found for a network of that name where there is one; else that of CIFAR-10's ResNet-20
    for sides below 128 pixels and that of ResNet-18 for larger ones.

    Args:
        image_shape: (C, H, W).
        reference: what the user called the teacher, e.g. ``pytorchcv:resnet50``.

    Example:
        >>> found = default_architecture((3, 224, 224), "timm:mobilenetv2_100.ra_in1k")
        >>> found == published_architectures()["mobilenetv2"]
        True
    """
    found = published_architectures()
    # after a dot: timm's name of the weights (resnet50.a1_in1k), or a file's suffix
    name = re.split(r"[:/]", reference.lower())[-1].partition(".")[0]
    name = ALIASES.get(name, name)
    if name in found:
        return found[name]
    return found["resnet18" if is_large(image_shape) else "resnet20_cifar10"]
