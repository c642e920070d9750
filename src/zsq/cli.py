# SPDX-License-Identifier: Apache-2.0
"""The command line. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Annotated

import typer

from zsq.cli_bench import measuring
from zsq.cli_study import study
from zsq.errors import RunError, ToldError, UsageError, ZsqError, printable
from zsq.options import (
    AllowPickle,
    BitsOption,
    Compile,
    CudaGraphs,
    Device,
    Images,
    ImagesFrom,
    InputShape,
    Json,
    Mean,
    Memory,
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
from zsq.runtime.machine import end_with_parent, is_one_of_several

#: What typer exits with after Ctrl-C.
_INTERRUPTED = 130
#: What a file system answers that is full, or may not be used.
_REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_SMALLER = (
    "Take smaller batches (--set synthesis.batch=N, --set tuning.batch=N) or make them one after another "
    "(--set synthesis.parallel=1), in another folder."
)
_KEPT = (
    "What was there before is untouched; free some space or change permissions, then run the command "
    "again (`quantize` with --resume)."
)

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Quantize a trained neural network without its data.",
)  # fmt: skip


def _refuse_to_share(command: str | None) -> None:
    """Let `torchrun` start `quantize` alone: others would do all their work in every process."""
    if command in {None, "quantize", "env"} or not is_one_of_several() or "--help" in sys.argv:
        return
    if os.environ["RANK"] == "0":
        _tell(UsageError(f"only quantize can be shared; start `zsq {command}` without torchrun."))
    raise ToldError(UsageError.exit_code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    _refuse_to_share(context.invoked_subcommand)
    if version:
        import zsq

        typer.echo(f"zsq {zsq.__version__}")
        raise typer.Exit


@app.command()
def quantize(
    model: Model,
    out: Annotated[str, typer.Option("-o", "--out", help="Folder for the run.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe name or YAML file.")] = "genie",
    bits: BitsOption = None,
    protocol: ProtocolOption = None,
    schedule: ScheduleOption = Schedule.full,
    settings: Settings = None,
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
    memory: Memory = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help=(
        "Diagnose the layers and write report.html at the end."))] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Synthesise images, quantize, save, export to ONNX and check the file.

    Several GPUs or machines: torchrun --nproc-per-node N -m zsq quantize ...
    """
    from zsq import pipeline
    from zsq.artifact.runfolder import RunFolder
    from zsq.runtime.joining import joined
    from zsq.tables import run_table

    with joined(device, _tell) as group:
        pipeline.quantize(
            model, recipe, bits=bits, protocol=protocol, schedule=schedule.value, settings=settings or (),
            input_shape=integers(input_shape, "--input-shape"), mean=numbers(mean, "--mean"),
            std=numbers(std, "--std"), resize=resize, weights=weights, allow_pickle=allow_pickle,
            images=images, images_from=images_from, seed=seed, device=group.device, precision=precision.value,
            compile=compile_, cuda_graphs=cuda_graphs, memory=memory, out=out, resume=resume, report=report,
            reporter=reporter_for(quiet or as_json), group=group,
        )  # fmt: skip
    if group.rank:
        return
    record = {"run": out, **RunFolder.open(out).record}
    show(record, as_json, lambda: run_table(record))


@app.command()
def inspect(
    model: Model,
    bits: BitsOption = None,
    input_shape: InputShape = None,
    weights: Weights = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Show what was understood: batch norms, units, what each protocol quantizes, size."""
    from zsq.bits.plan import read_plan
    from zsq.config import Bits
    from zsq.tables import inspection_tables
    from zsq.teacher.inspect import inspect_teacher
    from zsq.teacher.teacher import load_teacher

    teacher = load_teacher(
        model,
        input_shape=integers(input_shape, "--input-shape"),
        weights=weights,
        allow_pickle=allow_pickle,
    )
    plan = read_plan(bits)
    given = plan.widths() if plan else Bits.parse(bits) if bits else None
    found = inspect_teacher(teacher, given, overrides=plan.checked(teacher) if plan else ())
    show(found.to_dict(), as_json, lambda: inspection_tables(found))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    target: Annotated[str, typer.Option("--target", help="Runtime to place quantizers for.")] = "ort-cpu",
    out: Annotated[str | None, typer.Option("-o", "--out", help="File to write [RUN/model.onnx].")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help=(
        "Accept layers that do not run as integers, or answers that differ."))] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write the ONNX file, run it in ONNX Runtime, compare it with the simulation."""
    from zsq import pipeline
    from zsq.tables import export_table

    report = pipeline.export(
        run,
        target=target,
        path=out,
        allow_partial=allow_partial,
        reporter=reporter_for(quiet or as_json),
    ).to_dict()
    show(report, as_json, lambda: export_table(report))


@app.command()
def evaluate(
    subject: Annotated[str, typer.Argument(help="Folder of a run, an ONNX file, or a MODEL.")],
    data: Annotated[
        str, typer.Option("--data", help="Folder with a folder of images for each class.")
    ],
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    weights: Weights = None,
    allow_pickle: AllowPickle = False,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 200,
    simulated: Annotated[
        int,
        typer.Option(
            "--simulated",
            min=0,
            help="Images on which a run's file is compared with its exact simulation, which is slow; 0: none.",
        ),
    ] = 1000,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Top-1 and top-5 with standard error; teacher and student on the same images."""
    from zsq import judge
    from zsq.tables import evaluation_table

    result = judge.evaluate(
        subject, data, input_shape=integers(input_shape, "--input-shape"), mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"), resize=resize, weights=weights, allow_pickle=allow_pickle, batch=batch,
        simulated=simulated, device=device, reporter=reporter_for(quiet or as_json),
    )  # fmt: skip
    show(result, as_json, lambda: evaluation_table(result))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe in full.")] = None,
    as_json: Json = False,
) -> None:
    """List recipes with paper and settings."""
    from zsq.config import load_recipe, recipe_names
    from zsq.tables import recipe_details, recipes_table

    if name is not None:
        recipe = load_recipe(name)
        show(json.loads(recipe.model_dump_json()), as_json, lambda: recipe_details(recipe))
        return
    found = [load_recipe(each) for each in recipe_names()]
    plain = [json.loads(recipe.model_dump_json()) for recipe in found]
    show({"recipes": plain}, as_json, lambda: recipes_table(found))


@app.command()
def env(as_json: Json = False) -> None:
    """Show what is installed and what the machine offers."""
    from zsq.runtime.environment import environment
    from zsq.tables import environment_table

    found = environment()
    show(found, as_json, lambda: environment_table(found))


@app.command()
def demo(
    out: Annotated[str | None, typer.Option("-o", "--out", help="Keep the run here.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a small network on scikit-learn's digits, quantize it without them, deploy it."""
    from zsq.showcase import run_demo
    from zsq.tables import demo_table

    result = run_demo(out, reporter_for(quiet or as_json))
    show(result, as_json, lambda: demo_table(result))


app.add_typer(measuring)
app.add_typer(study)


def _tell(error: ZsqError) -> None:
    sys.stderr.write(f"zsq: {printable(str(error))}\n")
    sys.stderr.flush()


def _full_memory(error: BaseException) -> str | None:
    """Name the memory that an error says is full, if it says so."""
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which not every command imports
        return "the GPU's memory"
    full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return "the memory" if full else None


def main() -> None:
    """Run the command line; exit 2 for what cannot work, 1 for what failed, 130 when interrupted."""
    end_with_parent()
    try:
        app()
    except ToldError as error:
        sys.exit(error.exit_code)
    except ZsqError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except (RuntimeError, MemoryError) as error:
        where = _full_memory(error)
        if where is None:
            raise
        _tell(RunError(f"{where} is full: {(str(error).splitlines() or [''])[0][:150]} {_SMALLER}"))
        sys.exit(RunError.exit_code)
    except OSError as error:
        if error.errno not in _REFUSED_WRITES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _tell(RunError(f"the file system refuses{where}: {error.strerror}. {_KEPT}"))
        sys.exit(RunError.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            sys.stderr.write(
                "zsq: interrupted; `quantize` goes on with the same command and --resume.\n"
            )
        raise
