# SPDX-License-Identifier: Apache-2.0
"""The command that measures: `zsq bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from zsq.options import (
    AllowPickle,
    Compile,
    CudaGraphs,
    Device,
    InputShape,
    Json,
    Precision,
    PrecisionChoice,
    Quiet,
    Weights,
    integers,
    reporter_for,
    show,
)

measuring = typer.Typer()


@measuring.command()
def bench(
    model: Annotated[str, typer.Argument(help="MODEL, as for quantize.")] = "zsq:resnet20_cifar10",
    loop: Annotated[list[str] | None, typer.Option("--loop", help=(
        "genie, pixels, finetuning or reconstruction; may be repeated. All of them by default."))] = None,
    batch: Annotated[int | None, typer.Option("--batch", help=(
        "Images a step; by default as published."))] = None,
    images: Annotated[int | None, typer.Option("--images", help=(
        "Size of the set that is made or tuned on; by default one or two batches."))] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps to time, of every block in turn.")] = 50,
    plain: Annotated[bool, typer.Option("--plain", help=(
        "Time the published loops in plain eager float32 too."))] = False,
    grow: Annotated[list[str] | None, typer.Option("--grow", metavar="AXIS[=SIZES]", help=(
        "Time and memory over images, batch or network, e.g. batch=16,32,64 or "
        "network=pytorchcv:resnet18,pytorchcv:resnet50; may be repeated."))] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help=(
        "JSON file to write; curves go beside it as a picture."))] = None,
    input_shape: InputShape = None,
    weights: Weights = None,
    allow_pickle: AllowPickle = False,
    device: Device = "cpu",
    precision: Precision = PrecisionChoice.auto,
    compile_: Compile = True,
    cuda_graphs: CudaGraphs = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the loops beside the bare passes of the network and this machine's peak."""
    from pathlib import Path

    from zsq.bench import Request
    from zsq.bench import bench as run_bench
    from zsq.bench.plots import write_growth
    from zsq.bench.tables import bench_tables
    from zsq.runtime.files import atomic_write, check_destination, make_folder

    request = Request(
        model, batch=batch, images=images, steps=steps, device=device, precision=precision.value,
        compile=compile_, cuda_graphs=cuda_graphs, plain=plain, input_shape=integers(input_shape, "--input-shape"),
        weights=weights, allow_pickle=allow_pickle,
    )  # fmt: skip
    axes = [(axis, sizes.split(",") if sizes else ())
            for axis, _, sizes in (text.partition("=") for text in grow or ())]  # fmt: skip
    if out is not None:
        make_folder(Path(out).absolute().parent)
        check_destination(Path(out), (".json",))
    found = run_bench(request, loop or (), grow=axes, reporter=reporter_for(quiet or as_json))
    if out is not None:
        with atomic_write(Path(out)) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if axes:
            write_growth(found["growth"], Path(out).with_suffix(".png"))
    show(found, as_json, lambda: bench_tables(found))
