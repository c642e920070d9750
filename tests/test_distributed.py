# SPDX-License-Identifier: Apache-2.0
"""``torchrun -m zsq quantize``: whole runs of several processes, good ones and bad ones."""

import json

import pytest
import torch
from helpers import doomed
from helpers.ranks import launch
from helpers.runs import FEW, SHAPE, write_model, zsq, zsq_json
from safetensors.torch import load_file

from zsq import load
from zsq.demo import save_digits, train_digits
from zsq.runtime.metrics import read_metrics

ZSQ = ["-m", "zsq"]


def arguments(folder, run, *more):
    return ["quantize", folder / "net.pt2", "-o", folder / run, *SHAPE, *FEW, "--quiet", *more]


def tensors(path):
    return {k: v.tolist() for k, v in load_file(path).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("distributed")
    write_model(target)
    return target


@pytest.fixture(scope="module")
def killed(folder):
    """A run of two processes, one of which was killed after two of four pieces; what was said."""
    return launch(2, [doomed.__file__], 1, 2, *arguments(folder, "killed"))


def test_two_processes_leave_what_one_leaves(folder, monkeypatch, capsys):
    done = launch(2, ZSQ, *arguments(folder, "two", "--json"))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one object, from one process
    assert (record["status"], record["processes"]) == ("done", 2)
    one = zsq_json(monkeypatch, capsys, *arguments(folder, "one"))
    names = [{p.name for p in (folder / run).iterdir()} for run in ("one", "two")]
    assert names[0] == names[1]
    images = [tensors(folder / run / "images.safetensors") for run in ("one", "two")]
    assert images[0] == images[1]
    assert record["identity"] == one["identity"]
    counts = [
        len((folder / run / "metrics.jsonl").read_text().splitlines()) for run in ("one", "two")
    ]
    assert counts[0] == counts[1]
    x = load_file(folder / "one" / "images.safetensors")["images"]
    ours, theirs = (load(folder / run)(x) for run in ("one", "two"))
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.95


def test_a_process_that_dies_ends_the_run_with_a_message(folder, killed):
    assert killed.returncode != 0
    assert killed.stdout == ""
    assert killed.stderr.count("zsq: ") == 1, killed.stderr
    assert "--resume" in killed.stderr
    saved = sorted(p.stem for p in (folder / "killed" / "checkpoints").glob("piece_*"))
    assert saved == ["piece_000", "piece_001"]


def test_one_process_resumes_what_two_began(folder, killed, monkeypatch, capsys):
    code, _, err = zsq(monkeypatch, capsys, *arguments(folder, "killed"))
    assert code == 2
    assert "--resume" in err
    record = zsq_json(monkeypatch, capsys, *arguments(folder, "killed", "--resume"))
    assert (record["status"], record["processes"]) == ("done", 1)
    lines = (folder / "killed" / "metrics.jsonl").read_text().splitlines()
    finished = [m["piece"] for m in map(json.loads, lines) if "undecided" in m]
    assert len(finished) == len(set(finished)) == 4, "no piece is made twice"


def test_images_of_several_methods_do_not_depend_on_the_number_of_processes(
    folder, monkeypatch, capsys
):
    parts = [
        "--set",
        "synthesis={method: mixed, images: 24, steps: 4, batch: 4, parts: [hast, intraq, genie]}",
    ]
    options = ["quantize", folder / "net.pt2", *SHAPE, "--no-compile", "--precision", "fp32", "--no-report",
               "--set", "tuning.steps=2", *parts]  # fmt: skip
    done = launch(2, ZSQ, *options, "-o", folder / "mixed two", "--json")
    assert done.returncode == 0, done.stderr
    zsq_json(monkeypatch, capsys, *options, "-o", folder / "mixed one")
    runs = [folder / f"mixed {count}" for count in ("one", "two")]
    one, two = (tensors(run / "images.safetensors") for run in runs)
    assert one == two
    one, two = (sorted({r["stage"] for r in read_metrics(run / "metrics.jsonl")}) for run in runs)
    assert one == two
    assert {"synthesis part 1", "synthesis part 3"} <= set(one)


def told_once(done):
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("zsq: ") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr


def test_what_process_0_finds_is_told_once(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("all of it")
    told_once(launch(2, ZSQ, *arguments(folder, "mine")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [("--bits", "w9a9"), ("--device", "cuda:0"), ("--set", "tuning.batch=1")]
)
def test_what_all_find_is_told_once(folder, more):
    told_once(launch(2, ZSQ, *arguments(folder, "bad", *more)))


@pytest.mark.slow
def test_three_processes_resume_what_two_began(folder):
    done = launch(2, [doomed.__file__], 0, 3, *arguments(folder, "third"))
    assert done.returncode != 0
    done = launch(3, ZSQ, *arguments(folder, "third", "--resume", "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["genie", "gdfq+ait"])
def test_accuracy_is_that_of_one_process(tmp_path, monkeypatch, capsys, name):
    module, images, labels = train_digits()
    save_digits(module, tmp_path / "digits.safetensors")
    settings = {
        "genie": ["synthesis.images=64", "synthesis.batch=32", "synthesis.steps=150",
                  "tuning.steps=200"],
        "gdfq+ait": ["synthesis.batch=63", "synthesis.steps=150", "tuning.steps=150"],
    }[name]  # fmt: skip
    chosen = [part for setting in settings for part in ("--set", setting)]
    found = {}
    for run in ("one", "two"):
        command = ["quantize", "zsq:digits", "--weights", tmp_path / "digits.safetensors", "--recipe",
                   name, "--bits", "w4a4", "--schedule", "quick", "-o", tmp_path / run, *chosen,
                   "--no-compile", "--precision", "fp32", "--no-report", "--quiet"]  # fmt: skip
        if run == "one":
            assert zsq(monkeypatch, capsys, *command)[0] == 0
        else:
            done = launch(2, ZSQ, *command, seconds=400)
            assert done.returncode == 0, done.stderr
        with torch.no_grad():
            found[run] = float((load(tmp_path / run)(images).argmax(1) == labels).float().mean())
    # two standard errors of a difference, at an accuracy of 95 % on 540 images
    assert abs(found["one"] - found["two"]) < 0.027, found
    assert found["two"] > 0.9, found
