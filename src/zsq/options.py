# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, how their values are read, and how results are shown."""

from __future__ import annotations

import enum
import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from zsq.errors import UsageError


class Schedule(enum.StrEnum):
    """How long to train."""

    quick = "quick"
    full = "full"


class PrecisionChoice(enum.StrEnum):
    """Precision of the passes of synthesis and tuning."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


Model = Annotated[str, typer.Argument(help=(
    "pytorchcv:NAME, torchvision:NAME, timm:NAME, zsq:NAME, path/to/file.py:function or a .pt2 file."
))]  # fmt: skip
InputShape = Annotated[
    str | None, typer.Option("--input-shape", help="One image: channels,height,width.")
]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Normalisation mean per channel, pixels in [0, 1].")
]
Std = Annotated[
    str | None, typer.Option("--std", help="Normalisation standard deviation per channel.")
]
Resize = Annotated[int | None, typer.Option("--resize", min=1, help=(
    "Short side to resize pictures to before the centre crop."))]  # fmt: skip
Weights = Annotated[str | None, typer.Option("--weights", help="Checkpoint to load, or 'random'.")]
AllowPickle = Annotated[bool, typer.Option(
    "--allow-pickle", help="Read pickled checkpoints. They run code from the file: only if you trust it."
)]  # fmt: skip
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, nothing else, on stdout.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
BitsOption = Annotated[
    str | None, typer.Option("--bits", help="Weights and activations, e.g. w4a4, or a bits file.")
]
ScheduleOption = Annotated[Schedule, typer.Option("--schedule", help=(
    "full: the published steps; quick: for a laptop, a little less accurate."))]  # fmt: skip
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
    "Change a recipe field, e.g. tuning.steps=500."))]  # fmt: skip
ProtocolOption = Annotated[str | None, typer.Option("--protocol", help=(
    "edges-8bit, integer or all-low-bit."))]  # fmt: skip
Images = Annotated[str | None, typer.Option("--images", help=(
    "Folder of real images to use instead of synthetic ones."))]  # fmt: skip
ImagesFrom = Annotated[list[str] | None, typer.Option("--images-from", metavar="RUN", help=(
    "Use the images of another run: its folder, or its images.safetensors. Repeatable: of all of them."))]  # fmt: skip
Seed = Annotated[int, typer.Option("--seed", min=0, help="All chance of a run follows from it.")]
Precision = Annotated[PrecisionChoice, typer.Option("--precision", help=(
    "Of what is learned; auto: bf16 where the hardware multiplies in it."))]  # fmt: skip
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help=(
    "Compile loops that are long enough to win the time back."))]  # fmt: skip
CudaGraphs = Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help=(
    "Replay compiled loops as CUDA graphs; needs a GPU."))]  # fmt: skip
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help=(
    "Most memory that block inputs, and a step of GENIE's synthesis, may take, e.g. 8GB [half of all]."
))]  # fmt: skip
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]


def numbers(
    text: str | None, option: str, example: str = "0.5,0.5,0.5"
) -> tuple[float, ...] | None:
    """Read comma-separated numbers.

    Args:
        text: what was typed.
        option: its name, for the error.
        example: of a right value, likewise.

    Raises:
        UsageError: not numbers.

    Example:
        >>> numbers("0.5, 1", "--mean")
        (0.5, 1.0)
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers like {example}.") from error


def integers(text: str | None, option: str, example: str = "3,224,224") -> tuple[int, ...] | None:
    """Read comma-separated whole numbers; see `numbers`.

    Raises:
        UsageError: not whole numbers.

    Example:
        >>> integers("3x8x8", "--input-shape")
        (3, 8, 8)
    """
    found = numbers(text, option, example)
    if found is not None and not all(value.is_integer() for value in found):  # nor is infinity
        raise UsageError(f"{option} {text!r} must be whole numbers like {example}.")
    return None if found is None else tuple(int(value) for value in found)


def reporter_for(quiet: bool) -> Any:
    """Return what shows progress, or nothing."""
    from zsq.runtime.progress import make_reporter

    return make_reporter("quiet" if quiet else "auto")


def show(result: dict[str, Any], as_json: bool, render: Any) -> None:
    """Print a result: one JSON object, or tables."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    # a pipe is as wide as the widest name, which somebody may look for
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(width=1000 if wide else None, emoji=False)
    for part in render():
        console.print(part)
