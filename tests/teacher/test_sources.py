# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: objects, strings, libraries, scripts."""

import os
import sys
import types
from enum import Enum
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.sources import NETWORK, assert_same_weights, tiny, write_script
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from zsq.errors import UsageError
from zsq.quantizers.protocol import layer_nodes
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.sources import check_finite, load_source

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


@pytest.mark.parametrize(
    "change", [
        partial(prune.l1_unstructured, name="weight", amount=0.5), nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_a_hook_computes_are_taken_as_they_are(change):
    module = tiny().eval()
    change(module[0])
    x = torch.randn(4, 3, 8, 8)
    wanted = module(x)
    network = build_network(export_module(load_source(module).module, (3, 8, 8)))
    torch.testing.assert_close(network(x), wanted)
    assert len(layer_nodes(network)) == 1
    assert module[0].weight.grad_fn is not None, "the user's own is left alone"


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
        (
            "import torch\nfrom torch import nn\nclass Net(nn.Module): pass\nn = 3\nready = nn.ReLU()\n"
            "def build(): return 3",
            "biuld",
            "it defines Net, ready, build[.]$",
        ),
        ("import torch", "build", "it defines none[.]$"),
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
