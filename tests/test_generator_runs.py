# SPDX-License-Identifier: Apache-2.0
"""The generator family as a person types it: run, interrupt, resume, load, evaluate, export."""

import json

import pytest
import torch
from helpers.runs import NORMALISATION, SHAPE, write_images, write_model, zsq, zsq_json
from safetensors.torch import load_file

import zsq as package
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.metrics import read_metrics
from zsq.tuning import finetune

FEW = [
    "--set", "synthesis.steps=6", "--set", "synthesis.batch=8", "--set", "synthesis.images=16",
    "--set", "tuning.steps=6", "--set", "tuning.range_steps=3", "--no-compile",
    "--precision", "fp32",
]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def arguments(model, run, recipe, *more):
    return ["quantize", model, "--recipe", recipe, "--bits", "w4a4", "-o", str(run), *SHAPE,
            *NORMALISATION, *FEW, *more]  # fmt: skip


@pytest.mark.parametrize("recipe", ["gdfq+ait", "qimera", "autorecon"])
def test_a_run_ends_in_a_file_that_agrees(model, tmp_path, monkeypatch, capsys, recipe):
    run = tmp_path / "run"
    done = zsq_json(monkeypatch, capsys, *arguments(model, run, recipe))
    export = done["results"]["export"]
    assert export["agreement"] >= 99.9
    assert export["fused"] == export["convs"] > 0
    scores = zsq_json(
        monkeypatch, capsys, "evaluate", run, "--data", write_images(tmp_path / "images")
    )
    assert {"teacher", "student", "onnx", "agreement"} <= set(scores)
    student = package.load(run)
    assert student.recipe.name == recipe
    assert student.placement.protocol == "all-low-bit"
    records = read_metrics(run / "metrics.jsonl")
    assert records[-1]["stage"] == "finetune"
    assert len(load_file(run / "images.safetensors")["images"]) == 16


def test_interrupted_and_resumed_it_ends_with_the_same_weights(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(finetune, "CHECKPOINT_EVERY", 2)
    code, _, err = zsq(monkeypatch, capsys, *arguments(model, tmp_path / "whole", "ait"))
    assert code == 0, err
    save = Checkpoints.save
    saved = []

    def save_and_stop(self, name, *rest):
        save(self, name, *rest)
        saved.append(name)
        if len(saved) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        code, _, err = zsq(patched, capsys, *arguments(model, tmp_path / "cut", "ait"))
    assert code == 130
    assert "--resume" in err
    code, _, err = zsq(monkeypatch, capsys, *arguments(model, tmp_path / "cut", "ait", "--resume"))
    assert code == 0, err
    for name in ("student.safetensors", "images.safetensors"):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_real_images_take_the_generators_place(model, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    images = write_images(tmp_path / "images")
    code, _, err = zsq(
        monkeypatch, capsys, *arguments(model, run, "gdfq+ait", "--images", images, "--quiet")
    )
    assert code == 0, err
    terms = set(read_metrics(run / "metrics.jsonl")[-1])
    assert "kl" in terms
    assert "generator_bns" not in terms


def test_generator_images_with_block_reconstruction(model, tmp_path, monkeypatch, capsys):
    """Any synthesiser with any tuner: a recipe that says so in two lines."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsynthesis: {method: generator}\ntuning: {steps: 4, batch: 8}\n")
    run = tmp_path / "run"
    code, _, err = zsq(
        monkeypatch, capsys, "quantize", model, "--recipe", recipe, "-o", run, *SHAPE, "--quiet",
        "--set", "synthesis.steps=3", "--set", "synthesis.batch=8", "--set", "synthesis.images=16",
        "--no-compile", "--precision", "fp32",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((run / "run.json").read_text())["results"]["export"]["agreement"] >= 99.9


def test_searched_cells_are_kept_with_the_run(model, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    code, _, err = zsq(
        monkeypatch, capsys, *arguments(model, run, "autorecon", "--quiet"),
        "--set", "synthesis.architecture=search", "--set", "synthesis.search_steps=2",
    )  # fmt: skip
    assert code == 0, err
    again = tmp_path / "again"
    code, _, err = zsq(
        monkeypatch, capsys, *arguments(model, again, "autorecon", "--quiet"),
        "--set", f"synthesis.architecture={run / 'architecture.yaml'}",
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tuning.losses.ke=1", "tuning.losses.ke"),
        ("tuning.inundation.target=2", "tuning.inundation.target"),
        ("synthesis.generator=gan", "synthesis.generator"),
        ("tuning.drop=0.5", "tuning.drop"),
        ("synthesis.architecture=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_bad_settings_are_named(model, tmp_path, monkeypatch, capsys, setting, says):
    code, _, err = zsq(
        monkeypatch, capsys, *arguments(model, tmp_path / "run", "autorecon+ait", "--set", setting)
    )
    assert code == 2
    assert says in err
