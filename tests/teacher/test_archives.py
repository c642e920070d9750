# SPDX-License-Identifier: Apache-2.0
"""Archives of torch.export, damaged and poisoned ones among them."""

import contextlib
import json
import math
import pickle
import zipfile

import pytest
import torch
from helpers.sources import Touch, tiny
from torch import nn

from zsq.errors import UsageError
from zsq.teacher.archives import load_exported
from zsq.teacher.sources import load_source
from zsq.teacher.teacher import load_teacher

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


def call(target, *arguments):
    """A node that calls something on arguments, as archives spell both."""
    inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
    outputs = [{"as_tensor": {"name": "more"}}]
    return {
        "target": target, "inputs": inputs, "outputs": outputs, "metadata": {}, "name": "more",
        "is_hop_single_tensor_return": True,
    }  # fmt: skip


def mkdir(trap):
    return f"__import__('os').mkdir('{trap}')"


def call_an_object(graph, trap):
    """`wrap` calls what it is given; PyTorch finds that by its name, and `S` evaluates texts."""
    evaluate = {"as_operator": "torch.fx.experimental.symbolic_shapes.sympy.S"}
    target = "torch.ops.higher_order.wrap_with_set_grad_enabled"
    graph["graph"]["nodes"].append(call(target, evaluate, {"as_string": mkdir(trap)}))


def call_any_function(graph, trap):
    node = call("torch.ops.higher_order.wrap", {"as_graph": {"name": "g"}})
    graph["graph"]["nodes"].append(node)


def name_an_argument(graph, trap):
    graph["graph"]["nodes"][0]["inputs"][0]["name"] = f"input={mkdir(trap)}"


def name_an_input(graph, trap):
    graph["graph"]["inputs"][-1]["as_tensor"]["name"] = f"x={mkdir(trap)}"


def name_a_parameter(graph, trap):
    spec = next(s for s in graph["signature"]["input_specs"] if "parameter" in s)
    spec["parameter"]["parameter_name"] = f'a", {mkdir(trap)}, "'


def name_the_signature(graph, trap):
    graph["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={mkdir(trap)}"]


def nest_the_arguments(graph, trap):
    graph["module_call_graph"][0]["signature"]["in_spec"] = f"[1, {mkdir(trap)}]"


def nest_with_escapes(graph, trap):
    graph["module_call_graph"][0]["signature"]["in_spec"] = '[1, "\\u0028"]'


def nest_in_a_class_of_a_module(graph, trap):
    nest = {"type": "collections.defaultdict", "context": {"default_factory_module": "antigravity"}}
    graph["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, nest])


def use_an_object(graph, trap):
    script = {"as_custom_obj": {"name": "x", "class_fqn": "__torch__.torch.classes.a.B"}}
    graph["graph"]["nodes"][0]["inputs"][0]["arg"] = script


def evaluate_a_text(graph, trap):
    letters = "+".join(f"S('chr')({ord(letter)})" for letter in mkdir(trap))
    graph["range_constraints"] = {"s0": {"expr_str": f"S('exec')({letters})"}}


def evaluate_for_years(graph, trap):
    graph["range_constraints"] = {"s0": {"expr_str": "9**9**9**9"}}


def read_a_file(graph, trap):
    size = {"as_int": 4}
    graph["graph"]["nodes"].insert(
        0, call("torch.ops.aten.from_file.default", {"as_string": str(trap)}, size)
    )


def write_anywhere(graph, trap):
    graph["graph"]["nodes"].append(call("torch.ops.aten._sparse_coo_tensor_unsafe.default"))


@pytest.mark.parametrize(
    ("poison", "why"),
    [
        (call_an_object, "holds the object 'torch.fx"),
        (call_any_function, "calls 'torch.ops.higher_order.wrap'"),
        (name_an_argument, "holds the name .input="),
        (name_an_input, "holds the name .x="),
        (name_a_parameter, "holds the name .a"),
        (name_the_signature, r"holds the name .*x="),
        (nest_the_arguments, r"nests arguments as .\[1, __import__"),
        (nest_with_escapes, "nests arguments as"),
        (nest_in_a_class_of_a_module, "nests arguments as"),
        (use_an_object, "holds the object"),
        (evaluate_a_text, "holds the expression"),
        (evaluate_for_years, "holds the expression '9"),
        (read_a_file, "'aten.from_file.default', which is not arithmetic on tensors"),
        (write_anywhere, "unsafe.default', which is internal to PyTorch"),
    ],
)
def test_graphs_that_could_do_harm_are_refused_before_they_are_built(
    archive, tmp_path, poison, why
):
    trap, path = tmp_path / "trap", tmp_path / "net.pt2"

    def change(entries):
        content = json.loads(entries["models/model.json"])
        poison(content["graph_module"], trap)
        entries["models/model.json"] = json.dumps(content).encode()

    rewrite(archive[0], path, change)
    with pytest.raises(UsageError, match=why):
        load_source(str(path))
    assert not trap.exists()


def test_guards_and_texts_of_example_inputs_are_not_run(archive, tmp_path):
    """PyTorch makes Python of both, and runs it, when it gives a module."""
    trap, path = tmp_path / "trap", tmp_path / "net.pt2"

    def change(entries):
        content = json.loads(entries["models/model.json"])
        content["guards_code"] = [mkdir(trap)]
        entries["models/model.json"] = json.dumps(content).encode()

    rewrite(archive[0], path, change)
    images = torch.randn(2, 3, 8, 8)
    loaded = load_source(str(path)).module.module()
    torch.testing.assert_close(loaded(images), archive[1](images))
    load_teacher(str(path))
    assert not trap.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(images)
    assert trap.exists()  # the trap works
    read = load_exported(path)
    assert not read._guards_code  # also where PyTorch would run them without example inputs

    class Two(nn.Module):
        def forward(self, images, mode):
            return images * 2

    trap.rmdir()
    text = f"a' or {mkdir(trap)} or 'b"
    program = torch.export.export(Two(), (images, text))
    torch.export.save(program, path)
    with contextlib.suppress(UsageError):
        load_teacher(str(path))
    load_source(str(path)).module.module()(images, text)
    assert not trap.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(images, text)
    assert trap.exists()


def test_sizes_may_be_computed(tmp_path):
    """With sizes that are not known, PyTorch writes arithmetic on them and powers of them."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2, 1)

        def forward(self, images):
            features = self.conv(images).flatten(1)
            return features * math.trunc(images.shape[2] / 3) / features.shape[1]

    side = torch.export.Dim("side", min=8, max=64)
    shapes = ({0: torch.export.Dim.DYNAMIC, 2: side, 3: side},)
    images = torch.randn(2, 3, 16, 16)
    path = tmp_path / "net.pt2"
    program = torch.export.export(Mean().eval(), (images,), dynamic_shapes=shapes)
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        model = archive.read(next(n for n in archive.namelist() if n.endswith("model.json")))
    assert b"Pow(" in model
    assert b"math.trunc" in model
    torch.testing.assert_close(
        load_source(str(path)).module.module()(images), program.module()(images)
    )


def test_parameters_may_have_names_that_are_no_identifiers(tmp_path):
    module = nn.Module()
    module.add_module("conv-1 (first)", nn.Conv2d(3, 4, 3))
    module.forward = lambda x: module._modules["conv-1 (first)"](x)
    path = tmp_path / "net.pt2"
    images = torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(module.eval(), (images,)), path)
    loaded = load_source(str(path)).module.module()
    torch.testing.assert_close(loaded(images), module(images))
