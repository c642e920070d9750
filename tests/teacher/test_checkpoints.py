# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and pickles: every layout, every damage, no code run unasked."""

import argparse
import sys
import types
import warnings

import pytest
import torch
from helpers.sources import Touch, assert_same_weights, tiny, write_script
from safetensors.torch import save_file

from zsq.errors import UsageError
from zsq.teacher.sources import load_source


@pytest.fixture
def script(tmp_path):
    return f"{write_script(tmp_path)}:build"


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    ],
    ids=["bare", "state_dict", "model", "data-parallel", "compiled-ddp"],
)
def test_checkpoint_layouts(tmp_path, script, wrap, legacy):
    state = tiny().state_dict()
    path = tmp_path / "w.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    assert_same_weights(load_source(script, weights=str(path)).module, state)


def test_safetensors_checkpoint_into_a_given_module(tmp_path):
    state = tiny().half().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    module = tiny()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    source = load_source(module, weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(source.module[0].weight, state["0.weight"].float())
    assert_same_weights(module, before)


def test_counters_of_old_checkpoints_may_be_missing(tmp_path, script):
    state = {k: v for k, v in tiny().state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "w.safetensors")
    module = load_source(script, weights=str(tmp_path / "w.safetensors")).module
    assert torch.equal(module[0].weight, state["0.weight"])


def test_keys_that_do_not_fit_are_named(tmp_path, script):
    state = tiny().state_dict()
    del state["0.bias"], state["1.bias"]
    state["1.weight"] = torch.zeros(7)
    state["head.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="does not fit the network") as caught:
        load_source(script, weights=str(tmp_path / "w.safetensors"))
    text = str(caught.value)
    assert "missing: 0.bias, 1.bias" in text
    assert "unexpected: head.weight" in text
    assert "other shapes: 1.weight ([7] in the file, [4] in the network)" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, script, dtype):
    """They would be rounded, or lose a part, on the way into the network."""
    state = tiny().state_dict()
    state["0.weight"] = state["0.weight"].to(dtype)
    torch.save(state, tmp_path / "w.pth")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UsageError, match=rf"not real numbers: 0\.weight \({kind} in the file\)"):
        load_source(script, weights=tmp_path / "w.pth")


def test_only_a_few_keys_are_listed(tmp_path, script):
    save_file({f"x{i}": torch.zeros(1) for i in range(9)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="x0, x1, x2 and 6 more"):
        load_source(script, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "-legacy.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_truncated_checkpoints(tmp_path, script, suffix, keep):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(tiny().state_dict(), path)
    else:
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization="legacy" not in suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UsageError, match=r"cannot be read as a checkpoint|holds pickled"):
        load_source(script, weights=str(path))


@pytest.mark.parametrize("content", [b"version https://git-lfs", b"<html>", b"PK\x03\x04broken"])
def test_files_that_are_no_checkpoints(tmp_path, script, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read as a checkpoint"):
        load_source(script, weights=str(path))


def test_missing_checkpoint(tmp_path, script):
    with pytest.raises(UsageError, match="does not exist"):
        load_source(script, weights=str(tmp_path / "no.pth"))
    with pytest.raises(UsageError, match="is a folder"):
        load_source(script, weights=str(tmp_path))


def test_checkpoint_without_state_dict(tmp_path, script):
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"no state dict: .* found epoch, optimizer"):
        load_source(script, weights=str(tmp_path / "w.pth"))


def test_nan_in_a_checkpoint_is_found(tmp_path, script):
    state = tiny().state_dict()
    state["1.running_mean"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"1\.running_mean holds NaN"):
        load_source(script, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("model", ["script", "module"])
def test_random_weights_are_for_names_only(script, model):
    with pytest.raises(UsageError, match="'random' is for networks built by name"):
        load_source(script if model == "script" else tiny(), weights="random")


# --- pickles -------------------------------------------------------------------------------------


def test_pickles_run_nothing_unless_allowed(tmp_path, script):
    trap = tmp_path / "trap"
    path = tmp_path / "w.pth"
    torch.save({"state_dict": tiny().state_dict(), "extra": Touch(trap)}, path)
    with pytest.raises(UsageError, match=r"--allow-pickle .* runs whatever code the file contains"):
        load_source(script, weights=str(path))
    with pytest.raises(UsageError, match="runs whatever code"):
        load_source(str(path))
    assert not trap.exists()
    load_source(script, weights=str(path), allow_pickle=True)
    assert trap.exists()  # the trap works, so its absence above means something


def test_checkpoint_with_options_needs_the_flag(tmp_path, script):
    state = tiny().state_dict()
    torch.save({"args": argparse.Namespace(lr=1), "model": state}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"argparse\.Namespace.*--allow-pickle"):
        load_source(script, weights=str(tmp_path / "w.pth"))
    source = load_source(script, weights=str(tmp_path / "w.pth"), allow_pickle=True)
    assert_same_weights(source.module, state)


def test_plain_pickle_of_a_newer_protocol_needs_the_flag(tmp_path, script):
    path = tmp_path / "w.pth"
    state = tiny().state_dict()
    torch.save(state, path, pickle_protocol=4)
    with pytest.raises(UsageError, match="--allow-pickle"):
        load_source(script, weights=str(path))
    assert_same_weights(load_source(script, weights=str(path), allow_pickle=True).module, state)


def test_torchscript_is_named_as_such(tmp_path, script):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(tiny()), tmp_path / "w.pt")
    for allow in (False, True):
        with pytest.raises(UsageError, match="is a TorchScript archive"):
            load_source(str(tmp_path / "w.pt"), allow_pickle=allow)


def test_whole_module_needs_the_flag(tmp_path):
    module = tiny().train()
    path = str(tmp_path / "whole.pt")
    torch.save(module, path)
    with pytest.raises(UsageError, match="--allow-pickle"):
        load_source(path)
    source = load_source(path, allow_pickle=True)
    assert_same_weights(source.module, module.state_dict())
    assert not source.module.training


def test_whole_module_whose_class_is_gone(tmp_path, monkeypatch):
    gone = types.ModuleType("gone_away")
    exec("from torch import nn\nclass Net(nn.Module): pass", gone.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gone_away", gone)
        torch.save(gone.Net(), tmp_path / "whole.pt")
    with pytest.raises(UsageError, match="classes that cannot be imported"):
        load_source(str(tmp_path / "whole.pt"), allow_pickle=True)
