# SPDX-License-Identifier: Apache-2.0
"""Interrupted, killed and damaged runs."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import FEW, SHAPE, write_model, zsq
from safetensors.torch import load_file

from zsq.errors import RunError
from zsq.runtime import policy
from zsq.runtime.checkpoints import Checkpoints
from zsq.tuning import compiling


def arguments(folder, run, *more):
    return ["quantize", str(folder / "net.pt2"), "-o", str(folder / run), *SHAPE, *FEW, "--quiet",
            *more]  # fmt: skip


def weights(folder):
    return {k: v.tolist() for k, v in load_file(folder / "student.safetensors").items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the model and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write_model(folder)
    done = subprocess.run([sys.executable, "-m", "zsq", *arguments(folder, "whole")], check=False)
    assert done.returncode == 0
    return folder


@pytest.mark.parametrize("stop_after", ["synthesis_000", "synthesis_001", "piece_000", "piece_002"])
def test_an_interrupted_run_ends_with_the_same_weights(whole, monkeypatch, capsys, stop_after):
    run = f"stopped_{stop_after}"
    save = Checkpoints.save

    def save_and_stop(self, name, *rest):
        save(self, name, *rest)
        if name == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        code, _, err = zsq(patched, capsys, *arguments(whole, run))
    assert code == 130
    assert "--resume" in err
    assert not (whole / run / "student.safetensors").exists()
    code, _, err = zsq(monkeypatch, capsys, *arguments(whole, run, "--resume"))
    assert code == 0, err
    assert weights(whole / run) == weights(whole / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_does_one_that_is_compiled_and_in_bf16(whole, monkeypatch, capsys):
    monkeypatch.setattr(policy, "MIN_STEPS_TO_COMPILE", 1)
    monkeypatch.setattr(compiling, "REPAID", 0)
    fast = ["--precision", "bf16", "--compile"]
    code, _, err = zsq(monkeypatch, capsys, *arguments(whole, "fast", *fast))
    assert code == 0, err
    save = Checkpoints.save
    for stop_after in ("synthesis_000", "piece_000", "piece_001"):
        run = f"fast_stopped_{stop_after}"

        def save_and_stop(self, name, *rest, last=stop_after):
            save(self, name, *rest)
            if name == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", save_and_stop)
            assert zsq(patched, capsys, *arguments(whole, run, *fast))[0] == 130
        torch.compiler.reset()  # as in another process
        code, _, err = zsq(monkeypatch, capsys, *arguments(whole, run, *fast, "--resume"))
        assert code == 0, err
        assert weights(whole / run) == weights(whole / "fast")
    assert weights(whole / "fast") != weights(whole / "whole")


def test_a_killed_run_ends_with_the_same_weights(whole):
    command = [sys.executable, "-m", "zsq", *arguments(whole, "killed")]
    process = subprocess.Popen(command)
    checkpoints = whole / "killed" / "checkpoints"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(checkpoints.glob("piece_*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.exists() or (whole / "killed" / "student.safetensors").exists()
    again = subprocess.run([*command, "--resume"], check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert weights(whole / "killed") == weights(whole / "whole")


def test_a_folder_that_is_deleted_meanwhile_ends_the_run(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    (tmp_path / "run").mkdir()
    checkpoints.save("first", {"x": torch.ones(1)})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunError, match=r"the folder .*run is gone"):
        checkpoints.save("second", {"x": torch.ones(1)})
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(whole, monkeypatch, capsys):
    before = (whole / "whole" / "run.json").read_bytes()
    for more, says in (
        ((), "--resume"),
        (("--bits", "w8a8"), "another run"),
        (("--bits", "w8a8", "--resume"), "bits"),
        (("--seed", "3", "--resume"), "seed"),
        (("--mean", "0.4,0.4,0.4", "--resume"), "mean was"),
    ):
        code, _, err = zsq(monkeypatch, capsys, *arguments(whole, "whole", *more))
        assert code == 2
        assert says in err
    assert (whole / "whole" / "run.json").read_bytes() == before
    (whole / "mine").mkdir()
    (whole / "mine" / "thesis.txt").write_text("all of it")
    code, _, err = zsq(monkeypatch, capsys, *arguments(whole, "mine"))
    assert code == 2
    assert "not an empty folder" in err
    assert (whole / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("name", ["run.json", "student.safetensors", "images.safetensors",
                                  "teacher.safetensors"])  # fmt: skip
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_run_is_a_clear_error(whole, tmp_path, monkeypatch, capsys, name, share):
    for path in (whole / "whole").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    code, _, err = zsq(monkeypatch, capsys, "export", tmp_path, "-o", tmp_path / "new.onnx")
    assert code == 2
    assert name in err
    assert not (tmp_path / "new.onnx").exists()


def test_a_full_disk_stops_the_run_and_loses_nothing(whole, monkeypatch, capsys):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("student.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        code, _, err = zsq(patched, capsys, *arguments(whole, "full"))
    assert code == 1
    assert "space" in err.lower()
    assert not [p for p in (whole / "full").rglob("*") if "tmp" in p.name]
    code, _, err = zsq(monkeypatch, capsys, *arguments(whole, "full", "--resume"))
    assert code == 0, err
    assert weights(whole / "full") == weights(whole / "whole")


def test_the_file_that_did_not_fit_a_full_disk_is_named(whole, monkeypatch, capsys):
    replace, full = os.replace, []

    def fill(source, target):
        if full or str(target).endswith("synthesis_001.safetensors"):
            full.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fill)
        code, _, err = zsq(patched, capsys, *arguments(whole, "filled"))
    assert code == 1
    assert "synthesis_001.safetensors" in err
    assert len(full) > 1  # run.json did not fit either


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_a_hint(whole, monkeypatch, capsys):
    code, _, err = zsq(
        monkeypatch, capsys,
        *arguments(whole, "diverged", "--set", "synthesis.latent_lr=1e30", "--set",
                   "synthesis.generator_lr=1e30"),
    )  # fmt: skip
    assert code == 1
    assert "step" in err
    assert "synthesis.latent_lr" in err
    assert json.loads((whole / "diverged" / "run.json").read_text())["status"] != "done"


def test_resuming_what_never_began_says_so(whole, monkeypatch, capsys):
    asked = [part for part in arguments(whole, "new", "--resume") if part != "--quiet"]
    code, out, err = zsq(monkeypatch, capsys, *asked)
    assert code == 0, err
    assert "holds no run to go on with; it begins there" in " ".join((out + err).split())
