# SPDX-License-Identifier: Apache-2.0
"""Archives of torch.export, damaged and poisoned ones among them."""

import contextlib
import pickle
import zipfile

import pytest
import torch
from helpers.sources import Touch, tiny
from torch import nn

from zsq.errors import UsageError
from zsq.teacher.sources import load_source

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
