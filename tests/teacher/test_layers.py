# SPDX-License-Identifier: Apache-2.0
import copy
import operator

import pytest
import torch
from torch import nn

from zsq.errors import UsageError
from zsq.teacher.layers import BatchNorm, Layer, operator_name, resolve_operator


def conv_layer(**options):
    settings = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, **options}
    weight = torch.randn(4, 6 // settings["groups"], 3, 3)
    return Layer("aten.conv2d.default", weight, torch.randn(4), tuple(settings.values()))


def test_a_layer_computes_its_operator_with_all_settings():
    layer = conv_layer(stride=[2, 1], padding=[1, 0], dilation=[1, 2], groups=2)
    x = torch.randn(2, 6, 9, 9)
    reference = nn.functional.conv2d(x, layer.weight, layer.bias, (2, 1), (1, 0), (1, 2), 2)
    assert torch.equal(layer(x), reference)
    assert (layer.stride, layer.groups, layer.is_linear) == ((2, 1), 2, False)
    other = layer.apply_weight(x, layer.weight * 2, None)
    assert torch.allclose(
        other, (reference - layer.bias.reshape(-1, 1, 1)) * 2, rtol=1e-5, atol=1e-5
    )


def test_settings_of_layers_that_leave_them_out():
    linear = Layer("aten.linear.default", torch.randn(5, 3), None)
    assert (linear.stride, linear.groups, linear.is_linear) == ((), 1, True)
    bare = Layer("aten.conv2d.default", torch.randn(4, 3, 1, 1), None)
    assert (bare.stride, bare.groups) == ((1, 1), 1)
    single = Layer("aten.conv2d.default", torch.randn(4, 3, 1, 1), None, ([2],))
    assert single.stride == (2, 2)


def test_a_deep_copy_is_independent_and_complete():
    layer = conv_layer().requires_grad_(False).eval()
    layer.add_module("norm", nn.BatchNorm2d(4))
    copied = copy.deepcopy(layer)
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(copied(x), layer(x))
    assert not copied.weight.requires_grad
    assert not copied.training
    assert isinstance(copied.norm, nn.BatchNorm2d)
    assert copied.norm is not layer.norm
    copied.weight.zero_()
    assert float(layer.weight.abs().sum()) > 0


def test_a_shared_layer_is_copied_once():
    layer = conv_layer()
    first, second = copy.deepcopy([layer, layer])
    assert first is second


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs_in_eval_mode_and_an_affine_map(affine):
    theirs = nn.BatchNorm2d(4, eps=1e-3, affine=affine).eval()
    theirs.running_mean.normal_()
    theirs.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = BatchNorm(
        theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var, theirs.eps
    ).train()
    x = torch.randn(3, 4, 5, 5)
    expected = theirs(x)
    assert torch.equal(ours(x), expected)
    assert torch.equal(ours.running_mean, theirs.running_mean), "also in train mode"
    scale, shift = (t.reshape(-1, 1, 1) for t in ours.scale_and_shift())
    assert torch.allclose(x * scale + shift, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["aten.relu.default", "aten.add.Tensor", "aten.cat.default", "aten.sym_size.int",
     "aten.zeros.default", "operator.mul", "operator.getitem"],
)  # fmt: skip
def test_names_of_operators_round_trip(name):
    assert operator_name(resolve_operator(name)) == name


def test_python_operators_are_named():
    assert operator_name(operator.floordiv) == "operator.floordiv"
    assert resolve_operator("operator.sub") is operator.sub


@pytest.mark.parametrize(
    "name",
    ["aten.from_file.default", "aten.nonsense.default", "aten.relu.nonsense", "aten.relu",
     "prims.convert_element_type.default", "operator.attrgetter", "builtins.eval", "os.system", "",
     "aten.__class__.mro", "aten.__dict__.get", "aten.relu.__call__", "aten.relu.op"],
)  # fmt: skip
def test_anything_but_tensor_arithmetic_is_refused(name):
    with pytest.raises(UsageError, match="operator"):
        resolve_operator(name)
