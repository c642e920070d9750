# SPDX-License-Identifier: Apache-2.0
"""The command line as a person types it."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from helpers.runs import FEW, NORMALISATION, SHAPE, write_images, write_model, zsq, zsq_json
from safetensors import safe_open

import zsq as package
from zsq.teacher import inspect as inspecting


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of a network whose file is gone, and a folder of images."""
    folder = tmp_path_factory.mktemp("made")
    model = write_model(folder)
    arguments = ["quantize", model, "--bits", "w4a4", "-o", str(folder / "run"), *SHAPE,
                 *NORMALISATION, *FEW, "--quiet"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "zsq", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder / "net.pt2").unlink()
    return folder, done.stdout, write_images(folder / "images")


def test_quantize_prints_what_came_out(made):
    folder, printed, _ = made
    for text in (
        "genie, edges-8bit, w4a4",
        "agreement, file/simulation",
        "integer convolutions",
        "x smaller than",
        "x the speed",
    ):
        assert text in printed
    names = {p.name for p in (folder / "run").iterdir()}
    assert names >= {
        "run.json", "recipe.yaml", "metrics.jsonl", "images.safetensors", "student.safetensors",
        "teacher.safetensors", "model.onnx",
    }  # fmt: skip
    assert not (folder / "run" / "checkpoints").exists()


def test_a_run_loads_without_the_model_and_its_weights_are_packed(made):
    folder, _, _ = made
    student = package.load(folder / "run")
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert student(x).shape == (3, 5)
    with safe_open(folder / "run" / "student.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert torch.uint8 in kinds.values()
    package.save(student, folder / "copy.safetensors")
    assert torch.equal(package.load(folder / "copy.safetensors")(x), student(x))


def test_images_are_saved_with_labels_and_provenance(made):
    from zsq.synthesis.images import ImageSet

    images = ImageSet.load(made[0] / "run" / "images.safetensors")
    assert images.images.shape == (16, 3, 8, 8)
    assert images.labels.shape == (16,)
    assert images.provenance["method"] == "genie"
    assert images.provenance["seed"] == 0


def test_evaluate_compares_teacher_student_and_file(made, monkeypatch, capsys):
    folder, _, images = made
    result = zsq_json(monkeypatch, capsys, "evaluate", folder / "run", "--data", images)
    for name in ("teacher", "student", "onnx"):
        assert 0 <= result[name]["top1"] <= result[name]["top5"] <= 100
        assert result[name]["stderr"] >= 0
    assert 0 <= result["agreement"] <= 100
    assert result["onnx"]["agreement"] == 100
    for apart in (result["divergence"], result["onnx"]["divergence"]):
        assert apart["nats"] > 0
        assert apart["images"] == result["student"]["images"]
    plain = zsq_json(
        monkeypatch, capsys, "evaluate", folder / "run", "--data", images, "--simulated", 0
    )
    assert "simulation" not in plain
    assert "agreement" not in plain["onnx"]
    assert plain["onnx"]["drop"] == result["onnx"]["drop"]
    code, out, _ = zsq(monkeypatch, capsys, "evaluate", folder / "run", "--data", images, "--quiet")
    assert code == 0
    assert "top-1" in out
    alone = zsq_json(
        monkeypatch, capsys, "evaluate", folder / "run" / "model.onnx", "--data", images,
        *SHAPE, *NORMALISATION,
    )  # fmt: skip
    assert alone["onnx"]["top1"] == result["onnx"]["top1"]


def test_export_prints_the_named_figures(made, monkeypatch, capsys):
    folder, _, _ = made
    report = zsq_json(
        monkeypatch, capsys, "export", folder / "run", "--target", "ort-cpu",
        "-o", folder / "again.onnx",
    )  # fmt: skip
    assert (report["fused"], report["convs"], report["agreement"]) == (6, 6, 100)
    assert report["bytes"] == (folder / "again.onnx").stat().st_size
    assert report["speedup"] > 0


def test_few_shot_uses_the_images_of_a_folder(made, tmp_path, monkeypatch, capsys):
    _, _, images = made
    model = write_model(tmp_path)
    record = zsq_json(
        monkeypatch, capsys, "quantize", model, "--images", images, "-o", tmp_path / "run",
        "--bits", "w8a8", *SHAPE, *NORMALISATION, *FEW,
    )  # fmt: skip
    assert record["status"] == "done"
    assert record["results"]["export"]["agreement"] == 100
    code, _, err = zsq(
        monkeypatch, capsys, "quantize", model, "--images", images, "-o", tmp_path / "other", *SHAPE,
        *FEW,
    )  # fmt: skip
    assert code == 2
    assert "--mean" in err


def test_inspect_recipes_env_and_version(tmp_path, monkeypatch, capsys):
    found = zsq_json(monkeypatch, capsys, "inspect", write_model(tmp_path), *SHAPE)
    assert len(found["pairs"]) == 6
    code, out, _ = zsq(monkeypatch, capsys, "inspect", str(tmp_path / "net.pt2"), *SHAPE)
    assert code == 0
    assert "edges-8bit" in out
    names = {r["name"] for r in zsq_json(monkeypatch, capsys, "recipes")["recipes"]}
    assert names >= {"genie", "adaround", "brecq", "qdrop"}
    assert "2212.04780" in zsq(monkeypatch, capsys, "recipes")[1]
    assert "torch" in zsq(monkeypatch, capsys, "env")[1]
    assert zsq(monkeypatch, capsys, "--version")[1].strip() == f"zsq {package.__version__}"


@pytest.mark.parametrize(("arguments", "says"), [
    (["quantize", "nowhere.pt2", "-o", "r"], "nowhere.pt2"),
    (["quantize", "net.pt2", "-o", "r", "--input-shape", "3,9"], "input"),
    (["quantize", "net.pt2", "-o", "r", "--input-shape", "nan,32,32"], "like 3,224,224"),
    (["quantize", "net.pt2", "-o", "r", "--input-shape", "inf,8,8"], "like 3,224,224"),
    (["bits", "net.pt2", "--budget", "4", "--candidates", "a"], "numbers like 2,4,8"),
    (["bits", "net.pt2", "--budget", "4", "--candidates", "inf"], "whole numbers like 2,4,8"),
    (["quantize", "net.pt2", "-o", "r", "--bits", "w9a4"], "w4a4"),
    (["quantize", "net.pt2", "-o", "r", "--recipe", "magic"], "genie"),
    (["quantize", "net.pt2", "-o", "r", "--set", "tuning.stepz=4"], "tuning.stepz"),
    (["quantize", "net.pt2", "-o", "r", "--set", "tuning.steps"], "KEY=VALUE"),
    (["quantize", "net.pt2", "-o", "r", "--device", "tpu"], "cuda"),
    (["quantize", "net.pt2", "-o", "r", "--protocol", "free"], "protocol"),
    (["evaluate", "r", "--data", "nowhere"], "r"),
    (["export", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_cannot_work_is_one_sentence_and_exit_code_2(
    tmp_path, monkeypatch, capsys, arguments, says
):
    write_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    shape = SHAPE if arguments[0] == "quantize" and "--input-shape" not in arguments else []
    code, out, err = zsq(monkeypatch, capsys, *arguments, *shape)
    assert code == 2
    assert says in err
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_the_python_interface():
    from helpers.networks import Residual, with_own_statistics

    torch.manual_seed(0)
    module, x = with_own_statistics(Residual()), torch.randn(2, 3, 8, 8)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    student = package.quantize(
        module, "genie", bits="w8a8", example_inputs=x, compile=False, settings=FEW[1:10:2]
    )
    assert (student(x) - module(x)).norm() < 0.3 * module(x).norm()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.ENOTDIR, False)]
)
def test_a_disk_that_takes_no_more_is_one_sentence(monkeypatch, capsys, number, told):
    def refuse(*arguments, **named):
        raise OSError(number, os.strerror(number), "run/checkpoints")

    monkeypatch.setattr(inspecting, "inspect_teacher", refuse)
    if not told:
        with pytest.raises(OSError, match="checkpoints"):
            zsq(monkeypatch, capsys, "inspect", "zsq:resnet20_cifar10")
        return
    code, out, err = zsq(monkeypatch, capsys, "inspect", "zsq:resnet20_cifar10")
    assert (code, out) == (1, "")
    assert err.startswith(
        f"zsq: the file system refuses (run/checkpoints): {os.strerror(number)}. What was"
    )
    assert "--resume" in err


def test_a_gpus_full_memory_is_one_sentence(monkeypatch, capsys):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it.")

    monkeypatch.setattr(inspecting, "inspect_teacher", full)
    code, out, err = zsq(monkeypatch, capsys, "inspect", "zsq:resnet20_cifar10")
    assert (code, out) == (1, "")
    assert err.startswith(
        "zsq: the GPU's memory is full: CUDA out of memory. Tried to allocate 2 GiB. Take "
    )
    assert len(err.splitlines()) == 1


def test_the_hosts_full_memory_is_one_sentence(monkeypatch, capsys):
    def full(*arguments, **named):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"
        )

    monkeypatch.setattr(inspecting, "inspect_teacher", full)
    code, _, err = zsq(monkeypatch, capsys, "inspect", "zsq:resnet20_cifar10")
    assert code == 1
    assert err.startswith("zsq: the memory is full: ")
    assert "synthesis.batch=N" in err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_quantize_is_shared_by_processes(monkeypatch, capsys, rank):
    told = {
        "WORLD_SIZE": "2",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "here",
        "MASTER_PORT": "1",
    }
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert zsq(monkeypatch, capsys, "recipes", "genie")[0] == 0  # some clusters set it everywhere
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert zsq(monkeypatch, capsys, "recipes", "--help")[0] == 0
    code, out, err = zsq(monkeypatch, capsys, "recipes")
    assert (code, out) == (2, "")
    assert err == (
        "zsq: only quantize can be shared; start `zsq recipes` without torchrun.\n"
        if rank == "0"
        else ""
    )


def test_names_are_whole_where_nobody_looks(monkeypatch, capsys):
    """In a pipe, where the next program looks for them."""
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = zsq(monkeypatch, capsys, "inspect", "zsq:resnet20_cifar10")
    assert "features_stage1_unit1_body_conv2_conv " in out
    assert "features.stage2.unit1.body.conv1.conv, features.stage2.unit1.identity_conv.conv " in out


@pytest.mark.parametrize(("command", "says"), [
    (["bits", "zsq:resnet20_cifar10", "--budget", "4.0", "-o", "file"], "cannot make the folder"),
    (["bench", "zsq:resnet20_cifar10", "-o", "b.png"], "ends in .json"),
    (["bench", "zsq:resnet20_cifar10", "-o", "file/b.json"], "cannot make the folder"),
    (["sweep", "sweep.yaml", "-o", "file"], "cannot make the folder"),
    (["quantize", "zsq:resnet20_cifar10", "-o", "file/run"], "cannot make the folder"),
    (["evaluate", "rnu", "--data", "."], "rnu does not exist; give the folder of a run"),
    (["evaluate", "zsq:resnet20_cifar10", "--data", ".", "--resize", "100000"], "at most 512"),
    (["quantize", "zsq:resnet20_cifar10", "--resize", "10", "-o", "new"], "give at least 32"),
    (["quantize", "zsq:resnet20_cifar10", "--images-from", "file", "-o", "new"], "Give a file that zsq wrote"),
])  # fmt: skip
def test_what_cannot_be_written_or_read_is_refused_at_once(
    tmp_path, monkeypatch, capsys, command, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "sweep.yaml").write_text("models: [a]\nrecipes: [genie]\n")
    for name in ("zsq.bench.bench", "zsq.bits.choose.choose_bits"):
        monkeypatch.setattr(name, None)  # what must not be reached
    code, _, err = zsq(monkeypatch, capsys, *command)
    assert code == 2
    assert says in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_ends_without_an_integer_file_says_so_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), "
        "nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()\n"
    )
    run = tmp_path / "run"
    code, _, err = zsq(
        monkeypatch,
        capsys,
        "quantize",
        f"{tmp_path / 'net.py'}:build",
        *SHAPE,
        *FEW,
        "--no-compile",
        "-o",
        run,
    )
    assert code == 1
    assert err.index("1 layers stay in float (conv_transpose2d") < err.index("would run in float")
    assert (run / "student.safetensors").exists()
