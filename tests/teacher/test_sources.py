# SPDX-License-Identifier: Apache-2.0
import argparse
import contextlib
import os
import pickle
import sys
import types
import warnings
import zipfile
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zsq.errors import UsageError
from zsq.teacher.sources import check_finite, load_source

NETWORK = """
from torch import nn
{extra}
def build():
    return nn.Sequential(nn.Conv2d(3, {width}, 3), nn.BatchNorm2d({width}))
"""


def tiny(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def write_script(folder, width=4, extra="", name="net.py"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(NETWORK.format(width=width, extra=extra))
    return path


@pytest.fixture
def script(tmp_path):
    return f"{write_script(tmp_path)}:build"


def assert_same_weights(module, state):
    own = module.state_dict()
    assert set(own) == set(state)
    for key, value in state.items():
        assert torch.equal(own[key], value), key


class Touch:
    """Writes a file when unpickled: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --- given objects -------------------------------------------------------------------------------


def test_given_module_is_copied_to_eval_float32_and_left_alone():
    module = tiny().double().train()
    source = load_source(module)
    assert source.reference == "module:Sequential"
    assert (source.input_shape, source.mean, source.std) == (None, None, None)
    assert not source.module.training
    assert not any(m.training for m in source.module.modules())
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    assert module.training
    assert module[0].weight.dtype == torch.float64
    with torch.no_grad():
        source.module[0].weight.zero_()
    assert module[0].weight.abs().sum() > 0


def test_wrappers_are_taken_off():
    source = load_source(nn.DataParallel(tiny()))
    assert isinstance(source.module, nn.Sequential)
    assert source.reference == "module:Sequential"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_values_that_are_not_finite_are_named(name, value):
    module = tiny()
    module.state_dict()[name].flatten()[1] = value
    kind = "NaN" if value != value else "infinite"
    with pytest.raises(UsageError, match=rf"{name} holds {kind} values \(1 of"):
        check_finite(module)
    with pytest.raises(UsageError, match=name):
        load_source(module)


def test_networks_without_values_are_refused():
    with pytest.raises(UsageError, match="no values yet"):
        load_source(nn.Sequential(nn.LazyConv2d(4, 3)))
    with torch.device("meta"):
        module = tiny()
    with pytest.raises(UsageError, match="no values yet"):
        load_source(module)


def test_other_types_are_refused():
    with pytest.raises(UsageError, match="not a int"):
        load_source(3)


# --- strings that name nothing -------------------------------------------------------------------


@pytest.mark.parametrize("model", ["resnet18", "keras:resnet18", "timm:", "net.onnx", ""])
def test_unknown_forms_list_the_known_ones(model):
    with pytest.raises(UsageError, match=r"names no network: MODEL is pytorchcv:NAME"):
        load_source(model)


def test_weights_without_an_architecture_say_what_is_missing(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    torch.save(tiny().state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        with pytest.raises(UsageError, match="no network: name the architecture"):
            load_source(str(tmp_path / name))


# --- libraries -----------------------------------------------------------------------------------


def test_pytorchcv_gives_the_input_shape_and_no_normalisation():
    pytest.importorskip("pytorchcv")
    source = load_source("pytorchcv:resnet20_cifar10", weights="random")
    assert source.input_shape == (3, 32, 32)
    assert source.mean is source.std is source.resize is None
    assert source.module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_unknown_name_suggests_close_ones():
    pytest.importorskip("pytorchcv")
    with pytest.raises(UsageError, match=r"'resnet20_cifar1o': did you mean .*resnet20_cifar10"):
        load_source("pytorchcv:resnet20_cifar1O")
    with pytest.raises(UsageError, match="there are resnet20_cifar10, digits"):
        load_source("zsq:nothing")


def test_weights_that_cannot_be_downloaded_offer_other_ways(monkeypatch, capsys):
    store = pytest.importorskip("pytorchcv.models.model_store")

    def offline(**_):
        print("Downloading ...")
        raise ConnectionError("no route to host")

    monkeypatch.setattr(store, "get_model_file", offline)
    with pytest.raises(UsageError, match=r"cannot be obtained \(ConnectionError: no route.*random"):
        load_source("pytorchcv:resnet20_cifar10")
    printed = capsys.readouterr()
    assert printed.out == ""  # belongs to --json
    assert "Downloading" in printed.err


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_library_that_is_not_installed(monkeypatch, library):
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    with pytest.raises(UsageError, match=f"{library} is not installed: pip install {library}"):
        load_source(f"{library}:resnet18")


def test_library_that_breaks_on_import(monkeypatch, tmp_path):
    package = tmp_path / "timm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be imported \(RuntimeError: operator nms"):
        load_source("timm:resnet18")


@pytest.fixture
def fake_timm(monkeypatch):
    timm = types.ModuleType("timm")
    timm.calls = []

    def create_model(name, pretrained):
        timm.calls.append((name, pretrained))
        module = tiny()
        module.pretrained_cfg = {
            "input_size": (3, 224, 240),
            "mean": (0.5, 0.4, 0.3),
            "std": [0.1, 0.2, 0.3],
            "crop_pct": 0.875,
            "interpolation": "bicubic",
        }
        return module

    timm.create_model = create_model
    timm.list_models = lambda: ["resnet18", "resnet34"]
    monkeypatch.setitem(sys.modules, "timm", timm)
    return timm


def test_timm_metadata(fake_timm):
    source = load_source("timm:resnet18.a1_in1k")
    assert fake_timm.calls == [("resnet18.a1_in1k", True)]
    assert source.input_shape == (3, 224, 240)
    assert source.mean == (0.5, 0.4, 0.3)
    assert source.std == (0.1, 0.2, 0.3)
    assert source.resize == 256  # 224 / 0.875
    assert source.interpolation == "bicubic"
    with pytest.raises(UsageError, match="'resnet19': did you mean resnet18"):
        load_source("timm:resnet19")


def test_own_weights_replace_the_librarys(fake_timm, tmp_path):
    state = tiny().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    source = load_source("timm:resnet18", weights=str(tmp_path / "w.safetensors"))
    assert fake_timm.calls == [("resnet18", False)]
    assert_same_weights(source.module, state)


def test_torchvision_metadata(monkeypatch):
    class Interpolation(Enum):
        BICUBIC = "bicubic"

    preset = types.SimpleNamespace(
        crop_size=[224],
        resize_size=[256],
        mean=[0.5, 0.4, 0.3],
        std=[0.1, 0.2, 0.3],
        interpolation=Interpolation.BICUBIC,
    )
    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(transforms=lambda: preset))
    built = []
    models = types.ModuleType("torchvision.models")
    models.list_models = lambda: ["resnet18"]
    models.get_model = lambda name, weights: built.append((name, weights)) or tiny()
    models.get_model_weights = lambda name: weights
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    source = load_source("torchvision:resnet18")
    assert built == [("resnet18", "DEFAULT")]
    assert source.input_shape == (3, 224, 224)
    assert (source.mean, source.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert (source.resize, source.interpolation) == (256, "bicubic")
    load_source("torchvision:resnet18", weights="random")
    assert built[-1] == ("resnet18", None)


# --- Python files --------------------------------------------------------------------------------


def test_script_with_a_helper_beside_it(tmp_path):
    for width in (4, 6):
        folder = tmp_path / f"project{width}"
        path = write_script(folder, width="helper.WIDTH", extra="import helper")
        (folder / "helper.py").write_text(f"WIDTH = {width}")
        source = load_source(f"{path}:build")
        assert source.reference == f"{path}:build"
        # the second project must not see the first one's helper
        assert source.module[0].out_channels == width
        assert str(folder) not in sys.path
        assert "helper" not in sys.modules
    assert "net" not in sys.modules


def test_script_may_define_dataclasses_and_hold_a_network(tmp_path):
    extra = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Options:\n    width: int = 4\n"
    )
    path = tmp_path / "net.py"
    path.write_text(extra + NETWORK.format(width=4, extra="") + "\nready = build()\nnumber = 3\n")
    assert load_source(f"{path}:build").module[0].out_channels == 4
    assert load_source(f"{path}:ready").module[0].out_channels == 4


@pytest.mark.parametrize(
    ("body", "function", "message"),
    [
        ("def build(): return 3", "build", "returned a int, not a torch.nn.Module"),
        ("def build(): return 3", "biuld", "has no function 'biuld': it defines build"),
        ("def build(n): return n", "build", "failed .TypeError.*without arguments"),
        ("import no_such_module_at_all", "build", "cannot be imported .ModuleNotFoundError"),
        ("def build(:", "build", "cannot be imported .SyntaxError"),
        ("import sys\nsys.exit(3)", "build", "cannot be imported .SystemExit"),
    ],
)
def test_script_errors(tmp_path, body, function, message):
    path = tmp_path / "net.py"
    path.write_text(body)
    before = list(sys.path)
    with pytest.raises(UsageError, match=message):
        load_source(f"{path}:{function}")
    assert sys.path == before


def test_script_that_is_missing_or_without_function(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_source(f"{tmp_path / 'no.py'}:build")
    with pytest.raises(UsageError, match=r"say which function .*no.py:FUNCTION"):
        load_source(f"{tmp_path / 'no.py'}")


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


# --- torch.export archives -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    module = nn.Sequential(tiny(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},), strict=False
    )
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(program, path)
    return path, module, program


def test_exported_program_from_a_file(archive):
    path, module, _ = archive
    source = load_source(str(path))
    assert source.input_shape == (3, 8, 8)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(source.module.module()(images), module(images))


def test_exported_program_itself(archive):
    source = load_source(archive[2])
    assert source.module is archive[2]
    assert (source.reference, source.input_shape) == ("module:ExportedProgram", (3, 8, 8))
    with pytest.raises(UsageError, match="brings its own weights"):
        load_source(archive[2], weights="w.safetensors")


def test_exported_program_of_another_type():
    program = torch.export.export(tiny().double().eval(), (torch.randn(2, 3, 8, 8).double(),))
    with pytest.raises(UsageError, match=r"exported with torch\.float64"):
        load_source(program)


def test_damaged_archives(archive, tmp_path):
    whole = archive[0].read_bytes()
    path = tmp_path / "net.pt2"
    for content in (b"", whole[: len(whole) // 2], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot be read as a torch\.export archive"):
            load_source(str(path))
    with pytest.raises(UsageError, match="does not exist"):
        load_source(str(tmp_path / "no.pt2"))


def rewrite(archive, path, change):
    """Copy an archive, its entries by name changed by ``change(entries)``."""
    with zipfile.ZipFile(archive) as old:
        root = old.namelist()[0].partition("/")[0]
        entries = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(f"{root}/{name}", content)


def poison_sample_inputs(entries, trap):
    name = next(name for name in entries if name.startswith("data/sample_inputs"))
    entries[name] = pickle.dumps(Touch(trap), protocol=2)


def poison_constant(entries, trap):
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Touch(trap))
    entries["data/constants/model_constants_config.json"] = (
        b'{"config": {"k": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true,'
        b' "tensor_meta": null}}}'
    )


def poison_shape(entries, trap):
    text = entries["models/model.json"].decode()
    start = text.index("Symbol(")
    end = text.index('"', start)
    code = f"__import__('os').mkdir('{trap}')"
    entries["models/model.json"] = (text[:start] + code + text[end:]).encode()


def poison_operator(entries, trap):
    text = entries["models/model.json"].decode()
    assert "torch.ops.aten.batch_norm.default" in text
    entries["models/model.json"] = text.replace(
        "torch.ops.aten.batch_norm.default", "torch.os.mkdir"
    ).encode()


@pytest.mark.parametrize(
    "poison", [poison_sample_inputs, poison_constant, poison_shape, poison_operator]
)
def test_archives_with_code_in_them_are_refused_before_it_runs(archive, tmp_path, poison):
    trap, path = tmp_path / "trap", tmp_path / "net.pt2"
    rewrite(archive[0], path, lambda entries: None)
    load_source(str(path))  # rewriting alone breaks nothing
    rewrite(archive[0], path, lambda entries: poison(entries, trap))
    with pytest.raises(UsageError, match=r"could run code on loading; --allow-pickle"):
        load_source(str(path))
    assert not trap.exists()
    if poison is not poison_operator:  # that one would run with the network, not on loading
        with contextlib.suppress(UsageError):
            load_source(str(path), allow_pickle=True)
        assert trap.exists()  # the trap works


# --- real networks -------------------------------------------------------------------------------


def test_shared_teachers():
    pytest.importorskip("pytorchcv")
    default = Path(__file__).parents[3] / "shared"
    models = Path(os.environ.get("ZSQ_SHARED", default)) / "teachers" / "models.py"
    if not models.is_file():
        pytest.skip("needs the trained networks in ZSQ_SHARED/teachers")
    source = load_source(f"{models}:resnet20_cifar10")
    zoo = load_source("zsq:resnet20_cifar10")
    assert_same_weights(zoo.module, source.module.state_dict())
