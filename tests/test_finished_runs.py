# SPDX-License-Identifier: Apache-2.0
"""Finished runs that have lost a file, or hold a damaged one."""

import shutil
import sys

import pytest
from helpers.runs import FEW, NORMALISATION, SHAPE, write_images, write_model, zsq
from safetensors.torch import load_file

from zsq import cli, pipeline
from zsq.artifact.runfolder import RunFolder
from zsq.errors import UsageError
from zsq.judge import evaluate

TOGETHER = [
    "--recipe", "gdfq", "--set", "synthesis.images=8", "--set", "synthesis.batch=4",
    "--set", "synthesis.steps=2", "--set", "tuning.steps=2", "--no-compile", "--precision", "fp32",
    "--no-report",
]  # fmt: skip
#: The same with a student that begins reconstructed.
STARTED = [*TOGETHER, "--set", "tuning.start={steps: 2, equalize_steps: 2}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network's file, a finished run of it, and one whose generator learned with the student."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder)
    for name, settings in (("genie", FEW), ("gdfq", TOGETHER), ("started", STARTED)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["zsq", *command(folder, folder / name, settings)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
    return folder


def command(folder, run, settings, *more):
    return ["quantize", str(folder / "net.pt2"), "-o", str(run), *SHAPE, *NORMALISATION, *settings, "--quiet",
            *more]  # fmt: skip


@pytest.fixture
def copy(made, tmp_path):
    def copied(name):
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return copied


def tensors(path):
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("name", "settings", "lost"), [
    ("genie", FEW, "images.safetensors"), ("genie", FEW, "integer.safetensors"),
    ("genie", FEW, "teacher.safetensors"), ("gdfq", TOGETHER, "images.safetensors"),
    ("genie", FEW, "equalization.safetensors"), ("started", STARTED, "equalization.safetensors"),
])  # fmt: skip
def test_what_is_missing_of_a_finished_run_is_made_again(
    made, copy, monkeypatch, capsys, name, settings, lost
):
    run = copy(name)
    recorded = (run / "metrics.jsonl").read_bytes()
    (run / lost).unlink()
    code, _, err = zsq(monkeypatch, capsys, *command(made, run, settings, "--resume"))
    assert code == 0, err
    for file in (lost, "student.safetensors", "integer.safetensors"):
        assert tensors(run / file) == tensors(made / name / file)
    if lost == "equalization.safetensors":
        assert (run / "metrics.jsonl").read_bytes() == recorded


def test_a_student_made_again_is_exported_again(made, copy, monkeypatch, capsys):
    run = copy("genie")
    (run / "student.safetensors").unlink()
    before = (run / "model.onnx").stat().st_mtime_ns
    assert zsq(monkeypatch, capsys, *command(made, run, FEW, "--resume"))[0] == 0
    assert tensors(run / "student.safetensors") == tensors(made / "genie" / "student.safetensors")
    assert (run / "model.onnx").stat().st_mtime_ns > before


def test_a_complete_run_stays_as_it_is(made, copy, monkeypatch, capsys):
    run = copy("genie")
    for name in ("report.html", "report.md", "diagnosis.json", "diagnosis.png"):
        (run / name).write_text("mine")
    with_report = [each for each in FEW if each != "--no-report"]
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert zsq(monkeypatch, capsys, *command(made, run, with_report, "--resume"))[0] == 0
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_that_has_its_images_goes_on_without_their_folder(tmp_path, monkeypatch, capsys):
    write_model(tmp_path)
    images = write_images(tmp_path / "images")
    few = command(tmp_path, tmp_path / "run", FEW, "--images", images)
    assert zsq(monkeypatch, capsys, *few)[0] == 0
    shutil.rmtree(images)
    (tmp_path / "run" / "student.safetensors").unlink()
    code, _, err = zsq(monkeypatch, capsys, *few, "--resume")
    assert code == 0, err


@pytest.mark.parametrize("name", ["images.safetensors", "teacher.safetensors", "integer.safetensors",
                                  "student.safetensors", "model.onnx", "equalization.safetensors"])  # fmt: skip
def test_a_truncated_file_of_a_finished_run_is_named_and_may_be_deleted(
    made, copy, monkeypatch, capsys, name
):
    run = copy("genie")
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[: len(data) * 9 // 10])
    code, _, err = zsq(monkeypatch, capsys, *command(made, run, FEW, "--resume"))
    assert code == 2
    assert name in err
    assert "Delete it" in err


@pytest.mark.parametrize("lost", ["model.onnx", "integer.safetensors"])
def test_evaluate_asks_for_an_export_where_half_of_it_is_missing(copy, tmp_path, lost):
    run, images = copy("genie"), write_images(tmp_path / "images")
    (run / lost).unlink()
    with pytest.raises(UsageError, match=rf"no {lost}; run `zsq export"):
        evaluate(run, images)


def test_a_truncated_recipe_of_a_finished_run_is_written_again(made, copy, monkeypatch, capsys):
    run = copy("genie")
    whole = (run / "recipe.yaml").read_bytes()
    (run / "recipe.yaml").write_bytes(whole[: len(whole) // 2])
    assert zsq(monkeypatch, capsys, *command(made, run, FEW, "--resume"))[0] == 0
    assert (run / "recipe.yaml").read_bytes() == whole


def test_an_evaluation_meanwhile_is_not_lost_with_an_export(copy, tmp_path, monkeypatch):
    run, images = copy("genie"), write_images(tmp_path / "images")
    export_run = pipeline.export_run

    def slowly(*arguments):
        report = export_run(*arguments)
        evaluate(run, images, simulated=0)
        return report

    monkeypatch.setattr(pipeline, "export_run", slowly)
    pipeline.export(run, path=tmp_path / "again.onnx")
    assert {"export", "evaluation"} <= set(RunFolder.open(run).record["results"])


def test_a_run_that_is_not_ours_is_exported_and_diagnosed(copy, tmp_path, monkeypatch, capsys):
    run = copy("genie")
    before = {path: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(RunFolder, "is_writable", lambda folder: False)
    code, out, err = zsq(monkeypatch, capsys, "export", run, "-o", tmp_path / "mine.onnx")
    assert code == 0
    assert "agreement" in out
    assert "the result is not kept" in err
    assert zsq(monkeypatch, capsys, "diagnose", run, "--images", 4)[0] == 0
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert (tmp_path / "mine.onnx").exists()


def test_export_looks_at_its_destination_first(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "export_run", None)  # what must not be reached
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.onnx", "no folder")):
        code, _, err = zsq(monkeypatch, capsys, "export", made / "genie", "-o", path)
        assert code == 2
        assert says in err
        assert "--resume" not in err
