# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
import torch
from helpers.families import randomise, read
from helpers.networks import Residual, images
from safetensors.torch import load_file
from torch import nn

import zsq
from zsq.tables import inspection_tables
from zsq.teacher.graph import export_module
from zsq.teacher.inspect import count_macs, inspect_teacher
from zsq.teacher.teacher import load_teacher

SHAPE = (3, 8, 8)


def residual():
    torch.manual_seed(0)
    return randomise(Residual())


def test_a_teacher_computes_what_the_module_computes_and_is_frozen():
    module = residual()
    teacher = load_teacher(module, input_shape=SHAPE)
    for count in (1, 2, 5):
        assert torch.allclose(teacher(images(count=count)), module(images(count=count)), atol=1e-6)
    assert not teacher(images()).requires_grad
    assert not teacher.network.training


def test_later_changes_of_the_module_do_not_reach_the_teacher():
    module = residual()
    teacher = load_teacher(module, input_shape=SHAPE)
    before = teacher(images())
    torch.nn.init.zeros_(module.fc.weight)
    module.train()
    assert torch.equal(teacher(images()), before)


def test_what_the_user_says_of_the_input_is_kept():
    teacher = load_teacher(residual(), input_shape=SHAPE, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert teacher.info.input_shape == SHAPE
    assert teacher.info.mean == (0.1, 0.2, 0.3)
    assert teacher.info.std == (0.4, 0.5, 0.6)
    assert "Residual" in teacher.info.reference
    assert load_teacher(residual(), input_shape=SHAPE).info.mean is None


def test_an_exported_program_knows_its_shape():
    program = export_module(residual(), SHAPE)
    teacher = load_teacher(program)
    assert teacher.info.input_shape == SHAPE
    assert torch.allclose(teacher(images(count=5)), residual()(images(count=5)), atol=1e-6)


def macs_by_hooks(module, shape):
    """Count every multiplication of the module's own layers from their output shapes."""
    found = {}

    def note(name):
        def hook(part, args, output):
            kernel = part.weight[0].numel()
            found[name] = output.numel() * kernel

        return hook

    hooks = [
        part.register_forward_hook(note(name))
        for name, part in module.named_modules()
        if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.no_grad():
        module(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["resnext", "mobilenetv2"])
def test_macs_count_grouped_and_depthwise_convolutions_right(family):
    module, network, x = read(family)
    shape = tuple(x.shape[1:])
    assert count_macs(network, shape) == macs_by_hooks(module, shape)


def test_the_first_convolution_of_resnet_has_the_macs_of_the_text_books():
    teacher = load_teacher(residual(), input_shape=SHAPE)
    assert count_macs(teacher.network, SHAPE)["stem"] == 8 * 8 * 4 * 3 * 3 * 3


def test_inspection_says_what_is_in_a_residual_network():
    module = residual()
    facts = inspect_teacher(load_teacher(module, input_shape=SHAPE))
    names = ["stem", "a1", "a2", "proj", "b1", "b2"]
    assert set(facts.batch_norms) == {f"{n}_bn" for n in names}
    assert set(facts.pairs) == {(n, f"{n}_bn") for n in names}
    assert facts.parameters == sum(p.numel() for p in module.parameters())
    assert facts.float_bytes == 4 * facts.parameters
    assert facts.macs == sum(macs_by_hooks(module, SHAPE).values())
    assert [len(unit["layers"]) for unit in facts.units] == [1, 3, 2, 1]
    assert [unit["parts"] for unit in facts.units] == [1, 1, 1, 1]
    by_path = {layer["path"]: layer for layer in facts.layers}
    assert set(by_path) == {*names, "fc"}
    assert by_path["a1"]["weight"] == [6, 4, 3, 3]
    assert by_path["a1"]["bits"] == {"edges-8bit": 4, "integer": 4, "all-low-bit": 4}
    assert by_path["stem"]["bits"] == {"edges-8bit": 8, "integer": 8, "all-low-bit": 4}
    by_name = {tensor["name"]: tensor for tensor in facts.tensors}
    for protocol, counts in facts.protocols.items():
        bits = [t["bits"][protocol] for t in facts.tensors if t["bits"][protocol]]
        assert Counter(f"{b} bits" for b in bits) == counts["activations"]
    skip = by_name["relu_default_2"]
    assert skip["read_by"] == ["b1", "add"]
    assert skip["shape"] == [1, 6, 4, 4]
    assert skip["bits"] == {"edges-8bit": 4, "integer": 4, "all-low-bit": 4}
    assert by_name["a2"]["bits"] == {"edges-8bit": None, "integer": 8, "all-low-bit": None}
    assert by_name["mean_dim"]["read_by"] == ["fc"]
    assert facts.protocols["edges-8bit"]["weights"] == {"4 bits": 5, "8 bits": 2}
    assert facts.to_dict()["model"] == facts.model


def test_expected_bytes_are_packed_codes_scales_zero_points_and_biases():
    facts = inspect_teacher(load_teacher(residual(), input_shape=SHAPE))
    eight = 4 * 3 * 9 + 5 * 6
    four = (6 * 4 * 9 + 6 * 6 * 9 + 6 * 4 + 2 * 6 * 6 * 9) // 2
    channels = 4 + 5 * 6 + 5  # a float scale, a byte of zero point and a 32-bit bias each
    assert facts.protocols["edges-8bit"]["bytes"] == eight + four + 9 * channels


class Everything(nn.Module):
    """Parameters outside layers and batch norms, and convolutions that nobody quantizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.bend = nn.Conv2d(3, 4, 3), nn.PReLU(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm, self.head = nn.LayerNorm([4, 12, 12]), nn.Linear(4, 5)

    def forward(self, x):
        x = self.norm(self.up(self.bend(self.stem(x))))
        own = x.mean((0, 2, 3)).reshape(4, 1, 1, 1)
        x = nn.functional.conv2d(x, own.expand(4, 1, 1, 1), groups=4)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("protocol", ["all-low-bit", "integer"])
def test_expected_bytes_are_those_of_a_students_file(tmp_path, protocol):
    """With its batch norms, where it keeps them."""
    teacher = load_teacher(residual(), input_shape=SHAPE)
    recipe = zsq.load_recipe("zeroq", protocol=protocol, bits="w4a4")
    ready, student = zsq.prepare(teacher, recipe, images(count=8))
    zsq.save(zsq.tune(ready, student, images(count=8)), tmp_path / "student.safetensors")
    stored = sum(t.nbytes for t in load_file(tmp_path / "student.safetensors").values())
    found = inspect_teacher(teacher).protocols[protocol]["bytes"]
    assert stored == found + 8 * len(
        student.quantizers()
    )  # of which each has a scale and a zero point


def test_inspection_counts_what_other_operators_hold_and_names_what_stays_float(capsys):
    module = Everything()
    facts = inspect_teacher(load_teacher(module, input_shape=SHAPE))
    assert facts.parameters == sum(p.numel() for p in module.parameters())
    assert [name.split("(")[1] for name in facts.floating] == ["conv_transpose2d)", "conv2d)"]
    rest = 4 + 4 * 4 * 4 + 4 + 2 * 4 * 144  # PReLU, transposed convolution, layer norm
    packed = 4 * 27 + 4 * 5 + 9 * (4 + 5)
    assert facts.protocols["edges-8bit"]["bytes"] == packed + 4 * rest
    text = "".join(map(str, inspection_tables(facts)))
    assert "stay in float under every protocol" in text
    assert not inspect_teacher(load_teacher(residual(), input_shape=SHAPE)).floating
