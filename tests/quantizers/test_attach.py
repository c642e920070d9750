# SPDX-License-Identifier: Apache-2.0
"""Students against a residual network written out by hand, quantizer by quantizer."""

import pytest
import torch
from helpers.networks import Concat, Net, Residual, conv, images, network_of
from torch.nn import functional

from zsq.config import Bits
from zsq.quantizers import attach
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import (
    calibrate,
    copy_network,
    insert_quantizers,
    quantize_layers,
    quantizer_path,
)
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import PROTOCOLS, place
from zsq.quantizers.weight import round_to_nearest
from zsq.teacher.fold import fold_batch_norms


def quantized(network, protocol, bits=None, calibrated=True):
    """Return a copy with quantizers, calibrated on the images unless told otherwise."""
    network = copy_network(network)
    placement = place(network, protocol, bits or Bits(weights=4, activations=3))
    quantize_layers(network, placement, lambda layer, bits: round_to_nearest(layer.weight, bits))
    insert_quantizers(network, placement, ActivationQuantizer)
    names = {n: network.get_submodule(quantizer_path(n)) for n in placement.activations}
    for part in names.values():
        part.requires_grad_(False)
        part.enabled = False
    if calibrated:
        calibrate(network, names, [images(count=8)])
        for part in names.values():
            part.enabled = True
    return network, names


def by_hand(network, names, x):
    """The folded residual network, each tensor rounded where the protocol says, in doubles."""

    def on_grid(name, value):
        if name not in names:
            return value
        scale, zero = names[name].scale.double(), names[name].zero_point.double()
        codes = (value / scale).round() + zero
        return (codes.clamp(0, 2 ** names[name].bits - 1) - zero) * scale

    def layer(path, value, stride=1, padding=1):
        part = network.get_submodule(path)
        frozen = part.frozen
        shape = (-1, 1, 1, 1)
        weight = (frozen.integers.double() - frozen.zero_point.double().reshape(shape)) * (
            frozen.scale.double().reshape(shape)
        )
        y = functional.conv2d(value, weight, part.bias.double(), stride, padding)
        return on_grid(path, y)

    x = on_grid("x", x.double())
    x = on_grid("relu_default", layer("stem", x).relu())
    y = on_grid("relu_default_1", layer("a1", x, 2).relu())
    x = layer("a2", y) + layer("proj", x, 2, 0)
    x = on_grid("relu_default_2", x.relu())
    y = on_grid("relu_default_3", layer("b1", x).relu())
    x = on_grid("relu_default_4", (layer("b2", y) + x).relu())
    x = on_grid("mean_dim", x.mean((2, 3)))
    head = network.get_submodule("fc").frozen
    weight = (head.integers.double() - head.zero_point.double()[:, None]) * head.scale.double()[
        :, None
    ]
    return functional.linear(x, weight, network.get_submodule("fc").bias.double())


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return fold_batch_norms(network_of(Residual()))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_student_computes_what_is_written_out_by_hand(residual, protocol):
    network, names = quantized(residual, protocol)
    x = images(count=8)
    with torch.no_grad():
        ours = network(x)
    assert torch.allclose(ours.double(), by_hand(network, names, x), atol=1e-5)
    assert not torch.allclose(ours, residual(x), atol=1e-2), "3 bits are seen in the logits"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_switched_off_quantizers_change_nothing(residual, protocol):
    network, names = quantized(residual, protocol, calibrated=False)
    with torch.no_grad():
        assert torch.allclose(network(images()).double(), by_hand(network, {}, images()), atol=1e-5)
    assert len(names) == sum(isinstance(part, ActivationQuantizer) for part in network.modules())


def test_at_8_bits_the_student_is_close_to_its_teacher(residual):
    for protocol in PROTOCOLS:
        network, _ = quantized(residual, protocol, Bits(weights=8, activations=8))
        expected = residual(images(count=8))
        error = (network(images(count=8)) - expected).abs().max()
        assert float(error) < 0.03 * float(expected.abs().max())


def test_all_readers_read_the_quantized_tensor(residual):
    network, names = quantized(residual, "edges-8bit", calibrated=False)
    nodes = {n.name: n for n in network.graph.nodes}
    for name in names:
        (quantizer,) = nodes[name].users
        assert quantizer.target == quantizer_path(name)
    readers = {r.name for r in next(iter(nodes["relu_default_2"].users)).users}
    assert readers == {"b1", "add_tensor_1"}, "the branch and the skip see the same codes"


def test_the_teacher_stays_as_it_is(residual):
    before = residual(images())
    targets = [str(n.target) for n in residual.graph.nodes]
    quantized(residual, "integer")
    assert torch.equal(residual(images()), before)
    assert [str(n.target) for n in residual.graph.nodes] == targets


def test_placing_twice_places_once(residual):
    network = copy_network(residual)
    placement = place(network, "integer", Bits())
    insert_quantizers(network, placement, ActivationQuantizer)
    once = [n.name for n in network.graph.nodes]
    insert_quantizers(network, placement, ActivationQuantizer)
    assert [n.name for n in network.graph.nodes] == once


def test_a_shared_quantizer_repeats_the_grid_and_changes_no_value():
    network = fold_batch_norms(network_of(Concat()))
    student, _ = quantized(network, "integer")
    calls = [n for n in student.graph.nodes if n.target == "quantizers.relu_default"]
    assert [n.args[0].name for n in calls] == ["relu_default", "max_pool2d_default"]
    x = images(count=8)
    expected = student(x)
    second = calls[1]
    second.replace_all_uses_with(second.args[0])
    student.graph.erase_node(second)
    student.recompile()
    assert torch.equal(student(x), expected)


def test_layers_become_quantized_layers_with_the_folded_bias(residual):
    network, _ = quantized(residual, "edges-8bit")
    for path in ("stem", "a1", "a2", "proj", "b1", "b2", "fc"):
        part, source = network.get_submodule(path), residual.get_submodule(path)
        assert isinstance(part, QuantizedLayer)
        assert torch.equal(part.bias, source.bias)
        step = part.frozen.scale.reshape(-1, *[1] * (source.weight.ndim - 1))
        assert float(((part.weight() - source.weight).abs() / step).median()) < 0.5


def test_a_tensor_of_symbolic_size_is_read_unquantized():
    """Sizes are read off the tensor itself, which a quantizer between them would not change."""
    module = Net(
        lambda n, x: n.b(n.a(x).relu().reshape(x.shape[0], 4, 8, 8)), a=conv(), b=conv(4, 4)
    )
    network = network_of(module)
    for count in (1, 5):
        student, _ = quantized(network, "integer")
        assert student(images(count=count)).shape == (count, 5)


# --- calibration ---------------------------------------------------------------------------------


def error_of(scale, zero, bits, values):
    codes = ((values / scale).round() + zero).clamp(0, 2**bits - 1)
    return float((((codes - zero) * scale - values).abs() ** 2.4).mean())


def test_steps_are_the_best_for_the_tensor_they_stand_on(residual):
    network, names = quantized(residual, "edges-8bit")
    x = images(count=8)
    stem = residual.get_submodule("stem")
    weight = network.get_submodule("stem").weight()
    values = functional.conv2d(x, weight, stem.bias, padding=1).relu().double()
    quantizer = names["relu_default"]
    assert float(quantizer.zero_point) == 0
    own = error_of(quantizer.scale.double(), 0, 8, values)
    for ratio in torch.linspace(0.05, 1, 50):
        other = error_of(float(values.max()) * ratio / 255, 0, 8, values)
        assert own <= other * 1.02


def test_two_sided_tensors_get_a_zero_point_and_one_sided_ones_none(residual):
    _, names = quantized(residual, "integer")
    assert float(names["x"].zero_point) > 0
    assert float(names["a2"].zero_point) > 0
    assert all(float(names[n].zero_point) == 0 for n in names if n.startswith("relu"))
    symmetric, names = quantized(residual, "integer", calibrated=False)
    calibrate(symmetric, names, [images(count=8)], asymmetric=False)
    assert float(names["x"].zero_point) == 128


def test_several_batches_count_like_one(residual):
    whole, names = quantized(residual, "edges-8bit", calibrated=False)
    split, others = quantized(residual, "edges-8bit", calibrated=False)
    calibrate(whole, names, [images(count=8)])
    calibrate(split, others, list(images(count=8).split(3)))
    for name, quantizer in names.items():
        assert others[name].scale.item() == pytest.approx(quantizer.scale.item(), rel=0.02)


@pytest.mark.parametrize(
    "shape", [(64, 12, 7, 7), (32, 10, 7, 7), (32, 16, 8, 8), (64, 30), (9, 15, 5, 3)]
)
@pytest.mark.parametrize("share", [7, 14, 49, 100])
def test_samples_are_of_every_channel_row_and_column(shape, share):
    """Each element holds its own place; a stride of 49 would see one corner of every 7 x 7 map."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).flatten(
        0, -2
    )
    whole = torch.arange(len(places)).reshape(shape)
    seen = places[attach._sample(whole, max(len(places) // share, 1)).long()]
    taken = len(places) // share
    for axis, side in enumerate(shape[1:], start=1):
        expected = min(side, taken // 2)
        assert seen[:, axis].unique().numel() >= expected
        if side * 20 < taken:
            counts = seen[:, axis].bincount(minlength=side).double()
            assert counts.max() < 1.5 * counts.min()


def test_large_tensors_are_sampled_with_their_extremes(monkeypatch):
    monkeypatch.setattr(attach, "SAMPLE", 1000)
    network = network_of(Net(lambda n, x: n.a(x).relu(), a=conv()), (3, 16, 16))
    x = images(3, 16, 16, count=8)  # 8192 values, of which one in nine is looked at
    x[5, :, 7, 11] = 40.0
    student, names = quantized(network, "all-low-bit", Bits(weights=8, activations=8), False)
    calibrate(student, names, [x], power=20.0)  # so that the largest value decides
    with torch.no_grad():
        largest = float(student.get_submodule("a")(x).relu().max())
    assert 255 * names["relu_default"].scale.item() == pytest.approx(largest, rel=0.1)
