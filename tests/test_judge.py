# SPDX-License-Identifier: Apache-2.0
"""What cannot be judged, or not as it was asked for, is refused before anything is kept."""

import json
import shutil

import pytest
from helpers.runs import NORMALISATION, SHAPE, write_images, write_model, zsq

from zsq import quantize
from zsq.artifact.runfolder import RunFolder
from zsq.config import load_recipe
from zsq.errors import RunError
from zsq.runtime.policy import Policy

FEW = ["synthesis.images=4", "synthesis.batch=4", "synthesis.steps=1", "tuning.steps=0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a run of it, and a folder of images."""
    folder = tmp_path_factory.mktemp("made")
    model = write_model(folder)
    quantize(
        model, load_recipe("genie", settings=FEW), mean=(0.5,) * 3, std=(0.25,) * 3, compile=False,
        precision="fp32", out=folder / "run", report=False,
    )  # fmt: skip
    write_images(folder / "images")
    return folder


@pytest.mark.parametrize(("subject", "options", "says"), [
    ("net.pt2", ["--device", "foo"], "'foo' is unknown; use cpu, cuda"),
    ("net.pt2", ["--device", "cuda:99"], "'cuda:99' does not exist"),
    ("run/model.onnx", ["--device", "cuda:99"], "'cuda:99' does not exist"),
    ("run", ["--weights", "random"], "--weights has no effect on run, a run"),
    ("run", SHAPE, "--input-shape has no effect on run, a run"),
    ("run", ["--allow-pickle"], "--allow-pickle has no effect on run, a run"),
    ("run/model.onnx", ["--weights", "random"], "--weights has no effect on run/model.onnx"),
])  # fmt: skip
def test_options_that_cannot_be_followed(made, monkeypatch, capsys, subject, options, says):
    monkeypatch.chdir(made)
    options = [*options, *(NORMALISATION if subject == "net.pt2" else [])]
    code, out, err = zsq(monkeypatch, capsys, "evaluate", subject, "--data", "images", *options)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_an_onnx_file_runs_on_the_cpu_alone(made, monkeypatch, capsys):
    monkeypatch.setattr(
        "zsq.judge.make_policy", lambda device: Policy()
    )  # a machine that has a GPU
    code, _, err = zsq(
        monkeypatch, capsys, "evaluate", made / "run" / "model.onnx", "--data", made / "images",
        "--device", "cuda",
    )  # fmt: skip
    assert code == 2
    assert "--device has no effect" in err


@pytest.mark.parametrize("subject", ["run", "run/model.onnx"])
@pytest.mark.parametrize("change", ["fewer", "more"])
def test_a_folder_of_other_classes_leaves_no_result(
    made, tmp_path, monkeypatch, capsys, subject, change
):
    shutil.copytree(made / "images", tmp_path / "images")
    if change == "fewer":
        (tmp_path / "images" / "class4").rmdir()
    else:
        (tmp_path / "images" / "class5").mkdir()
    before = (made / "run" / "run.json").read_text()
    code, _, err = zsq(
        monkeypatch, capsys, "evaluate", made / subject, "--data", tmp_path / "images",
        *NORMALISATION,
    )  # fmt: skip
    assert code == 2
    assert f"{4 if change == 'fewer' else 6} class folders" in err
    assert "5 classes" in err
    assert (made / "run" / "run.json").read_text() == before
    assert "evaluation" not in json.loads(before)["results"]


def test_a_result_that_cannot_be_kept_is_still_shown(made, monkeypatch, capsys, tmp_path):
    run, images = tmp_path / "run", made / "images"
    shutil.copytree(made / "run", run)

    def refuse(self):
        raise RunError("cannot write run.json: Read-only file system")

    monkeypatch.setattr(RunFolder, "save", refuse)
    code, out, err = zsq(monkeypatch, capsys, "evaluate", run, "--data", images, "--json")
    assert code == 0
    assert "top1" in json.loads(out)["student"]
    code, out, err = zsq(monkeypatch, capsys, "evaluate", run, "--data", images)
    assert "the result is not kept in the run: cannot write" in err
