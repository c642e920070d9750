# SPDX-License-Identifier: Apache-2.0
"""Mixed precision and other runs' images, from the command line to the ONNX file."""

import json

import onnx
import pytest
import torch
from helpers.runs import FEW, SHAPE, write_model, zsq, zsq_json

import zsq as package
from zsq.config import Override
from zsq.synthesis.images import ImageSet


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def bits_of(monkeypatch, capsys, model, folder, *options):
    few = ["--images-from", folder / "images.safetensors", "--quiet", *SHAPE]
    ImageSet(torch.randn(8, 3, 8, 8), torch.zeros(8).long()).save(folder / "images.safetensors")
    return zsq_json(monkeypatch, capsys, "bits", model, *few, *options)


def test_bits_are_chosen_shipped_and_kept_with_the_run(model, tmp_path, monkeypatch, capsys):
    plan = bits_of(
        monkeypatch, capsys, model, tmp_path, "--budget", "4.6", "-o", tmp_path / "bits",
        "--candidates", "2,4,5,8",
    )  # fmt: skip
    assert plan["average"] <= 4.6
    assert len(set(plan["layers"].values())) > 2
    record = zsq_json(
        monkeypatch, capsys, "quantize", model, "--bits", tmp_path / "bits" / "bits.yaml",
        "-o", tmp_path / "run", *SHAPE, *FEW,
    )  # fmt: skip
    assert record["results"]["export"]["agreement"] == 100
    student = package.load(tmp_path / "run")
    assert {path: layer.bits for path, layer in student.layers().items()} == plan["layers"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"bits.yaml", "bits_frontier.png", "bits_sensitivity.png"} <= names
    assert package.diagnose(tmp_path / "run", images=2).planned == tuple(
        Override(match=path, weights=bits) for path, bits in plan["layers"].items()
    )
    (tmp_path / "run" / "bits.yaml").write_text("cut o")
    assert package.diagnose(tmp_path / "run", images=2).planned == ()
    stored = onnx.load(tmp_path / "run" / "model.onnx").graph.initializer
    assert {onnx.TensorProto.INT4, onnx.TensorProto.INT8} <= {i.data_type for i in stored}
    assert sum(len(i.raw_data) for i in stored if len(i.dims) > 1) == plan["onnx_bytes"]


def test_bits_of_activations_are_chosen_and_shipped_too(model, tmp_path, monkeypatch, capsys):
    plan = bits_of(
        monkeypatch, capsys, model, tmp_path, "--budget", "4.6", "-o", tmp_path / "bits",
        "--activations", "3.5", "--recipe", "hast",
    )  # fmt: skip
    chosen = plan["edges"]["edges"]
    assert plan["edges"]["cost"] <= 3.5
    assert len(set(chosen.values())) > 1
    record = zsq_json(
        monkeypatch, capsys, "quantize", model, "--recipe", "hast", "--bits", tmp_path / "bits" / "bits.yaml",
        "-o", tmp_path / "run", *SHAPE, *FEW, "--set", "tuning.start={steps: 3}",
    )  # fmt: skip
    assert record["results"]["export"]["agreement"] == 100
    student = package.load(tmp_path / "run")
    assert {name: q.bits for name, q in student.quantizers().items()} == chosen
    assert {path: layer.bits for path, layer in student.layers().items()} == plan["layers"]
    planned = package.diagnose(tmp_path / "run", images=2).planned
    assert {each.edge: each.activations for each in planned if each.edge} == chosen
    assert {each.match: each.weights for each in planned if each.match} == plan["layers"]


@pytest.mark.parametrize("start", ["null", "{steps: 3}"])
@pytest.mark.parametrize("recipe", ["gdfq+ait", "autorecon", "hast"])
def test_fine_tuned_students_have_the_chosen_bits_too(
    model, tmp_path, monkeypatch, capsys, recipe, start
):
    plan = bits_of(
        monkeypatch, capsys, model, tmp_path, "--budget", "4.6", "-o", tmp_path / "bits",
        "--candidates", "2,4,5,8", "--recipe", recipe,
    )  # fmt: skip
    record = zsq_json(
        monkeypatch, capsys, "quantize", model, "--recipe", recipe, "-o", tmp_path / "run", *SHAPE,
        *FEW, "--bits", tmp_path / "bits" / "bits.yaml", "--set", f"tuning.start={start}",
    )  # fmt: skip
    student = package.load(tmp_path / "run")
    assert {path: layer.bits for path, layer in student.layers().items()} == plan["layers"]
    assert len(set(plan["layers"].values())) > 2
    for path, layer in student.layers().items():
        codes = layer.weight.integers
        assert len(codes.unique()) <= 2 ** plan["layers"][path], path
    assert record["results"]["export"]["agreement"] == 100


def test_set_overrides_and_a_file_go_together_or_are_refused(model, tmp_path, monkeypatch, capsys):
    plan = bits_of(
        monkeypatch, capsys, model, tmp_path, "--budget", "3", "-o", tmp_path / "bits",
        "--candidates", "2,3",
    )  # fmt: skip
    run = ["quantize", model, "--bits", tmp_path / "bits" / "bits.yaml", *SHAPE, *FEW]
    code, _, err = zsq(monkeypatch, capsys, *run, "-o", tmp_path / "refused", "--quiet",
                       "--set", "overrides=[{match: a1, weights: 5}]")  # fmt: skip
    assert code == 2
    assert "fixes it to 5" in err
    zsq_json(monkeypatch, capsys, *run, "-o", tmp_path / "run",
             "--set", "overrides=[{match: a2, activations: 7}]")  # fmt: skip
    student = package.load(tmp_path / "run")
    assert {path: layer.bits for path, layer in student.layers().items()} == plan["layers"]
    assert 7 in student.placement.activations.values()


def test_bits_are_shown_as_tables(model, tmp_path, monkeypatch, capsys):
    ImageSet(torch.randn(8, 3, 8, 8), torch.zeros(8).long()).save(tmp_path / "i.safetensors")
    wanted = ["bits", model, "--budget", "2kB", *SHAPE, "--quiet"]
    wanted += ["--images-from", tmp_path / "i.safetensors"]
    code, out, _ = zsq(monkeypatch, capsys, *wanted)
    assert code == 0
    for text in ("frontier", "fixed", "bits per weight", "in the ONNX file", "packed"):
        assert text in out
    assert "bits per value" not in out
    code, out, _ = zsq(monkeypatch, capsys, *wanted, "--activations", "4")
    assert code == 0
    for text in ("bits of activations, 4 on average", "relu_default_1", "bits per value of the"):
        assert text in out


def test_a_budget_that_cannot_be_met_exits_with_two(model, tmp_path, monkeypatch, capsys):
    ImageSet(torch.randn(8, 3, 8, 8), torch.zeros(8).long()).save(tmp_path / "i.safetensors")
    code, _, err = zsq(monkeypatch, capsys, "bits", model, "--budget", "1.5", *SHAPE, "--quiet",
                       "--images-from", tmp_path / "i.safetensors")  # fmt: skip
    assert code == 2
    assert "smallest possible is 2 bits per weight" in err


@pytest.fixture
def made(model, tmp_path, monkeypatch, capsys):
    """A ZeroQ run."""
    few = ["--set", "synthesis.images=8", "--set", "synthesis.steps=2", "--no-compile"]
    record = zsq_json(monkeypatch, capsys, "quantize", model, "--recipe", "zeroq", *SHAPE, *few,
                      "-o", tmp_path / "zeroq")  # fmt: skip
    assert record["status"] == "done"
    return tmp_path / "zeroq"


@pytest.mark.parametrize("recipe", ["genie", "hast", "gdfq+ait"])
def test_any_tuner_takes_another_runs_images(model, made, recipe, tmp_path, monkeypatch, capsys):
    few = ["--set", "tuning.steps=2", "--set", "tuning.batch=4", "--no-compile"]
    few += [] if recipe == "genie" else ["--set", "tuning.range_steps=2"]
    zsq_json(monkeypatch, capsys, "quantize", model, "--recipe", recipe, "--bits", "w4a4", *SHAPE,
             *few, "--images-from", made, "-o", tmp_path / "run")  # fmt: skip
    theirs = ImageSet.load(made / "images.safetensors")
    ours = ImageSet.load(tmp_path / "run" / "images.safetensors")
    assert torch.equal(ours.images, theirs.images)
    assert ours.provenance["method"] == "pixels"
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["images"].startswith("given ")


def test_other_images_are_another_run(model, made, tmp_path, monkeypatch, capsys):
    few = ["--set", "tuning.steps=2", "--set", "tuning.batch=4", *SHAPE, "-o", tmp_path / "run"]
    zsq_json(monkeypatch, capsys, "quantize", model, *few, "--images-from", made)
    ImageSet(torch.randn(8, 3, 8, 8), torch.zeros(8).long()).save(tmp_path / "i.safetensors")
    code, _, err = zsq(monkeypatch, capsys, "quantize", model, *few, "--resume",
                       "--images-from", tmp_path / "i.safetensors")  # fmt: skip
    assert code == 2
    assert "holds another run: images was" in err


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 8, 9), "images made for this network"), ((3, 8, 8), "exclude each other")]
)  # fmt: skip
def test_unfit_images_are_refused(model, tmp_path, monkeypatch, capsys, shape, message):
    ImageSet(torch.randn(8, *shape), torch.zeros(8).long()).save(tmp_path / "i.safetensors")
    both = ["--images", tmp_path] if "exclude" in message else []
    code, _, err = zsq(monkeypatch, capsys, "quantize", model, *SHAPE, "-o", tmp_path / "run", *both,
                       "--images-from", tmp_path / "i.safetensors", "--quiet")  # fmt: skip
    assert code == 2
    assert message in err


def test_a_folder_without_a_run_is_refused(model, tmp_path, monkeypatch, capsys):
    code, _, err = zsq(monkeypatch, capsys, "quantize", model, *SHAPE, "-o", tmp_path / "run",
                       "--images-from", tmp_path, "--quiet")  # fmt: skip
    assert code == 2
    assert "not a readable zsq run" in err


def test_bits_do_not_go_into_the_folder_of_a_run(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    code, _, err = zsq(
        monkeypatch, capsys, "bits", model, "--budget", "4.6", "-o", tmp_path / "run", *SHAPE
    )
    assert code == 2
    assert "holds a run" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
