# SPDX-License-Identifier: Apache-2.0
"""Commands that look before or after: bits per layer, diagnosis, report."""

from __future__ import annotations

from typing import Annotated

import typer

from zsq.options import (
    AllowPickle,
    Compile,
    CudaGraphs,
    Device,
    Images,
    ImagesFrom,
    InputShape,
    Json,
    Mean,
    Model,
    Precision,
    PrecisionChoice,
    ProtocolOption,
    Quiet,
    Resize,
    Schedule,
    ScheduleOption,
    Seed,
    Settings,
    Std,
    Weights,
    integers,
    numbers,
    reporter_for,
    show,
)

study = typer.Typer()


@study.command()
def analyse(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    images: Annotated[int, typer.Option("--images", min=2, help="Of the run, one fixed batch.")] = 128,
    probes: Annotated[int, typer.Option("--probes", min=2, help="Of the Hessian's trace.")] = 32,
    points: Annotated[int, typer.Option("--points", min=3, help="Along each direction.")] = 21,
    radius: Annotated[float, typer.Option("--radius", help="Of the surfaces, in filters' own norms.")] = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the curvature of a student's losses and draw their surfaces."""
    from zsq.analysis.landscape import analyse as analyse_run
    from zsq.analysis.tables import curvature_table
    from zsq.runtime.context import Context
    from zsq.runtime.policy import make_policy

    context = Context(seed, make_policy(device, "fp32", False), reporter_for(quiet or as_json))
    found = analyse_run(
        run, images=images, probes=probes, points=points, radius=radius, context=context
    )
    show(found.to_dict(), as_json, lambda: curvature_table(found.curvature))


@study.command()
def sweep(
    file: Annotated[
        str, typer.Argument(help="YAML: models, recipes, bits, seeds, schedule, settings, options, data.")
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="Folder for the runs and their table.")],
    workers: Annotated[int, typer.Option("--workers", help="Runs at a time.")] = 1,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help=(
        "Run on a Ray cluster: auto, host:port or local. Its machines share the folder and have zsq."))] = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run models x recipes x bits x seeds, going on where an earlier sweep stopped."""
    from zsq.sweep import Sweep, run_sweep
    from zsq.sweep.tables import sweep_tables

    cells = Sweep.load(file)
    if allow_pickle:
        cells = cells.model_copy(update={"options": (*cells.options, "--allow-pickle")})
    rows = run_sweep(cells, out, workers=workers, ray=ray, reporter=reporter_for(quiet or as_json))
    show({"cells": rows}, as_json, lambda: sweep_tables(rows))
    if any(row["status"] != "done" for row in rows):
        raise typer.Exit(1)


@study.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs.")],
    out: Annotated[str | None, typer.Option("-o", "--out", help=(
        "HTML file to write [RUN/report.html]; the summary in Markdown goes beside it."))] = None,
    real: Annotated[str | None, typer.Option("--real", help=(
        "Folder of real images to set the synthetic ones beside."))] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write one HTML file that shows what was done, what it cost and what came out."""
    from rich.text import Text

    from zsq.artifact.report import write_report

    path = write_report(runs, out, real=real, reporter=reporter_for(quiet or as_json))
    made = {"report": str(path), "summary": str(path.with_suffix(".md"))}
    show(made, as_json, lambda: [Text(str(path))])


@study.command()
def bits(
    model: Model,
    budget: Annotated[str | None, typer.Option("--budget", help=(
        "For weights: average bits per weight of the layers that the protocol leaves free (4.0), size of all weights "
        "in the ONNX file, INT4 up to 4 bits and INT8 above (1.7MB), bit operations of one image (2.5GBOP), or "
        "its time in ONNX Runtime on one thread (1.3ms, added up from each layer's share of a run)."))] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help=(
        "Folder for bits.yaml and its pictures; not that of a run."))] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe that the bits are for.")] = "genie",
    width: Annotated[str | None, typer.Option("--bits", help=(
        "Of what is not chosen, as in w4a4."))] = None,
    activations: Annotated[float | None, typer.Option("--activations", help=(
        "For activations: average bits per value of those that the protocol leaves free (4.0), chosen tensor "
        "by tensor."))] = None,
    protocol: ProtocolOption = None,
    schedule: ScheduleOption = Schedule.full,
    settings: Settings = None,
    candidates: Annotated[str, typer.Option("--candidates", help="Widths to choose from.")] = "2,3,4,5,6,8",
    images: Images = None,
    images_from: ImagesFrom = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    weights: Weights = None,
    allow_pickle: AllowPickle = False,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Precision = PrecisionChoice.auto,
    compile_: Compile = True,
    cuda_graphs: CudaGraphs = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Choose bits of layers, of activations, or both, by how much rounding one of them moves the answers."""
    from pathlib import Path

    from zsq.artifact.given import given_images
    from zsq.bits.choose import choose_bits
    from zsq.bits.plots import write_plan
    from zsq.bits.tables import bits_tables
    from zsq.errors import UsageError
    from zsq.runtime.context import Context
    from zsq.runtime.files import check_folder, make_folder
    from zsq.runtime.policy import make_policy
    from zsq.teacher.teacher import load_teacher

    if out is not None:
        if (Path(out) / "run.json").exists():  # its own bits.yaml may be in there
            raise UsageError(
                f"{out} holds a run, whose bits are settled; choose another folder with -o."
            )
        check_folder(Path(out))
    teacher = load_teacher(
        model, input_shape=integers(input_shape, "--input-shape"), mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"), resize=resize, weights=weights, allow_pickle=allow_pickle,
    )  # fmt: skip
    policy = make_policy(device, precision.value, compile_, cuda_graphs=cuda_graphs)
    plan = choose_bits(
        teacher, budget, recipe, bits=width, activations=activations, protocol=protocol, schedule=schedule.value,
        settings=settings or (),
        candidates=integers(candidates, "--candidates", "2,4,8") or (),
        images=given_images(images, images_from),
        context=Context(seed, policy, reporter_for(quiet or as_json)),
    )  # fmt: skip
    if out is not None:
        make_folder(Path(out))
        write_plan(plan, Path(out))
    show(plan.to_dict(), as_json, lambda: bits_tables(plan))


@study.command()
def diagnose(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    images: Annotated[int, typer.Option("--images", min=1, help="Of the run, to look at.")] = 64,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show which layers and edges hurt most, and what to do about them."""
    from zsq.analysis.runs import diagnose as diagnose_run
    from zsq.analysis.tables import diagnosis_tables
    from zsq.runtime.context import Context
    from zsq.runtime.policy import make_policy

    context = Context(0, make_policy(device, "fp32", False), reporter_for(quiet or as_json))
    found = diagnose_run(run, images=images, context=context)
    show(found.to_dict(), as_json, lambda: diagnosis_tables(found))
