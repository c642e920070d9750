# SPDX-License-Identifier: Apache-2.0
"""What cannot be judged, or not as it was asked for, is refused before anything is kept."""

import json
import re
import shutil

import numpy as np
import onnx
import pytest
import torch
from helpers.runs import NORMALISATION, SHAPE, write_images, write_model, zsq
from onnx import TensorProto, helper, numpy_helper

from zsq import evaluate, quantize
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


def write_onnx(path, shape, kind=TensorProto.FLOAT, more=()):
    """Write a network that pools an image of three channels and weighs the means for five classes."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).numpy()
    axes = [axis for axis in (2, 3) if axis < len(shape)]
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f", "axes"], ["m"], keepdims=0) if axes
        else helper.make_node("Slice", ["f", "from", "to", "axis"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]  # fmt: skip
    constants = {"w": weight, "axes": np.array(axes), "from": np.array([0]), "to": np.array([3]),
                 "axis": np.array([1])}  # fmt: skip
    graph = helper.make_graph(
        nodes, "pooled", [helper.make_tensor_value_info("x", kind, shape), *more],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_files_of_a_fixed_batch_are_evaluated(made, tmp_path, batch):
    """PyTorch's exporter fixes it unless told otherwise; the last part of 12 images is filled up."""
    scores = []
    for name, size in (("free.onnx", "N"), ("fixed.onnx", batch)):
        write_onnx(tmp_path / name, [size, 3, 8, 8])
        scores.append(evaluate(tmp_path / name, made / "images", mean=(0.5,) * 3, std=(0.25,) * 3))
    assert scores[0]["onnx"] == scores[1]["onnx"]


SECOND = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N"])


@pytest.mark.parametrize(("shape", "more", "options", "says"), [
    (["N", 3, 8, 8], {"kind": TensorProto.UINT8}, [], r"tensor\(uint8\)"),
    (["N", 3, 8, 8], {"more": [SECOND]}, [], "z tensor"),
    (["N", 192], {}, [], r"only files that take one batch of images"),
    (["N", 192], {}, SHAPE, r"only files that take one batch of images"),
    (["N", 3, 8, 8], {}, ["--input-shape", "3,16,16"], "takes images of 3 x 8 x 8, not of 3 x 16 x 16"),
    (["N", 3, 8, 8], {}, ["--input-shape", "3,8"], "not of 3 x 8"),
])  # fmt: skip
def test_files_that_cannot_be_evaluated_say_why(
    made, tmp_path, monkeypatch, capsys, shape, more, options, says
):
    write_onnx(tmp_path / "net.onnx", shape, **more)
    code, _, err = zsq(
        monkeypatch, capsys, "evaluate", tmp_path / "net.onnx", "--data", made / "images", *NORMALISATION,
        *options,
    )  # fmt: skip
    assert code == 2
    assert re.search(says, err)
    assert err.count("\n") == 1


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
