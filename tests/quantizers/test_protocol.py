# SPDX-License-Identifier: Apache-2.0
"""Placements against lists written by hand for small networks."""

from functools import cache

import pytest
from helpers.families import read
from helpers.networks import Concat, Inverted, Net, Residual, SqueezeExcite, conv, network_of
from torch import nn

from zsq.config import Bits, Override
from zsq.errors import UsageError
from zsq.quantizers.protocol import (
    PROTOCOLS,
    extend_to_integer,
    layer_nodes,
    origin,
    place,
)
from zsq.teacher.fold import fold_batch_norms, tensor_inputs

W3A5 = Bits(weights=3, activations=5)


@cache
def folded(module):
    return fold_batch_norms(network_of(module()))


#: network -> protocol -> bits by the tensor quantized; 5 is the low-bit width of activations
EXPECTED = {
    Residual: {
        "edges-8bit": {
            "relu_default": 8,  # what the second layer reads
            "relu_default_1": 5,
            "relu_default_2": 5,  # layer input and skip operand: one quantizer
            "relu_default_3": 5,
            "mean_dim": 8,  # what the last layer reads
        },
        "integer": {
            "x": 8, "relu_default": 8, "relu_default_1": 5, "a2": 8, "proj": 8,
            "relu_default_2": 5, "relu_default_3": 5, "b2": 8, "relu_default_4": 8, "mean_dim": 8,
        },
        "all-low-bit": dict.fromkeys(
            ["relu_default", *(f"relu_default_{i}" for i in range(1, 5))], 5
        ),
    },
    Inverted: {
        "edges-8bit": {
            "hardtanh_default": 8, "hardtanh_default_1": 5, "hardtanh_default_2": 5,
            "add_tensor": 5, "adaptive_avg_pool2d_default": 8,
        },
        "integer": {
            "x": 8, "hardtanh_default": 8, "hardtanh_default_1": 5, "hardtanh_default_2": 5,
            "pw": 8, "add_tensor": 5, "hardtanh_default_3": 8, "adaptive_avg_pool2d_default": 8,
        },
        "all-low-bit": dict.fromkeys(
            ["hardtanh_default", *(f"hardtanh_default_{i}" for i in range(1, 4))], 5
        ),
    },
    Concat: {
        "edges-8bit": {
            "relu_default": 8,  # before the pooling, which it commutes with
            "relu_default_1": 5, "cat_default": 5, "mean_dim": 8,
        },
        "integer": {
            "x": 8, "relu_default": 8, "relu_default_1": 5, "relu_default_2": 8,
            "relu_default_3": 8, "cat_default": 5, "relu_default_4": 8, "mean_dim": 8,
        },
        "all-low-bit": dict.fromkeys(
            ["relu_default", *(f"relu_default_{i}" for i in range(1, 5))], 5
        ),
    },
    SqueezeExcite: {
        "edges-8bit": {"relu_default": 8, "mean_dim": 5, "relu_default_2": 5, "mean_dim_1": 8},
        "integer": {
            "x": 8, "relu_default": 8, "relu_default_1": 8, "mean_dim": 5, "relu_default_2": 5,
            "up": 8, "sigmoid_default": 8, "mul_tensor": 8, "mean_dim_1": 8,
        },
        "all-low-bit": dict.fromkeys(["relu_default", "relu_default_1", "relu_default_2"], 5),
    },
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("module", EXPECTED)
def test_activations_are_those_listed_by_hand(module, protocol):
    placement = place(folded(module), protocol, W3A5)
    assert placement.activations == EXPECTED[module][protocol]
    assert placement.protocol == protocol


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_weights_of_the_first_and_last_layer_keep_8_bits_but_for_all_low_bit(protocol):
    ends = 3 if protocol == "all-low-bit" else 8
    weights = place(folded(Residual), protocol, W3A5).weights
    assert weights == {"stem": ends, **dict.fromkeys(["a1", "a2", "proj", "b1", "b2"], 3),
                       "fc": ends}  # fmt: skip
    assert next(iter(weights)) == "stem"
    assert list(weights)[-1] == "fc"


def test_first_and_last_are_so_by_execution_not_by_definition():
    module = Net(lambda n, x: n.b(n.z(x)), b=conv(4, 4), z=conv())
    placement = place(network_of(module), "edges-8bit", W3A5)
    assert placement.weights == {"z": 8, "b": 3, "fc": 8}


def test_value_preserving_operators_share_the_grid_of_what_they_move():
    assert place(folded(Concat), "integer", W3A5).shared == {"max_pool2d_default": "relu_default"}
    assert place(folded(Inverted), "integer", W3A5).shared == {
        "flatten_using_ints": "adaptive_avg_pool2d_default"
    }
    assert place(folded(Concat), "edges-8bit", W3A5).shared == {}


def test_the_networks_input_is_quantized_by_integer_only():
    module = Net(lambda n, x: n.b(n.a(x)).relu() + n.c(x), a=conv(), b=conv(4, 4), c=conv())
    network = network_of(module)  # two layers read the images
    assert "x" in place(network, "integer", W3A5).activations
    for protocol in ("edges-8bit", "all-low-bit"):
        assert "x" not in place(network, protocol, W3A5).activations


def test_unfolded_norms_between_layer_and_addition_count_as_the_layer():
    placement = place(network_of(Residual()), "edges-8bit", W3A5)
    assert placement.activations == EXPECTED[Residual]["edges-8bit"]


def test_a_norm_behind_an_addition_is_no_layer():
    """Pre-activation: the sum is the skip operand, and layers read what follows the norm."""

    def forward(net, x):
        x = net.a(x)
        x = x + net.b(net.bn(x).relu())
        return x + net.c(net.bn2(x).relu())

    module = Net(
        forward, a=conv(), b=conv(4, 4), c=conv(4, 4), bn=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4)
    )
    placement = place(fold_batch_norms(network_of(module)), "edges-8bit", W3A5)
    assert placement.activations == {
        "relu_default": 8, "add_tensor": 5, "relu_default_1": 5, "mean_dim": 8,
    }  # fmt: skip


def test_every_layer_but_the_first_reads_a_quantized_tensor():
    for family in ("mobilenetv3", "shufflenetv2", "densenet"):
        network = fold_batch_norms(read(family)[1])
        placement = place(network, "edges-8bit", W3A5)
        for layer in layer_nodes(network)[1:]:
            assert origin(tensor_inputs(layer)[0]).name in placement.activations


def test_logits_stay_float():
    for module in EXPECTED:
        network = folded(module)
        for protocol in PROTOCOLS:
            assert "fc" not in place(network, protocol, W3A5).activations


def test_views_of_the_logits_stay_float_too():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.head = conv(), conv(4, 5, 1)

        def forward(self, x):
            return self.head(self.c(x).relu().mean((2, 3), keepdim=True)).flatten(1)

    placement = place(network_of(Reshaped()), "integer", W3A5)
    assert set(placement.activations) == {"x", "relu_default", "mean_dim"}
    assert placement.shared == {}


def test_operators_with_several_results_get_no_quantizer():
    network = fold_batch_norms(read("dpn")[1])
    placement = place(network, "integer", W3A5)
    several = {n.name for n in network.graph.nodes
               if any("getitem" in str(user.target) for user in n.users)}  # fmt: skip
    assert several
    assert not several & {*placement.activations, *placement.shared}


# --- overrides and extension ---------------------------------------------------------------------


def test_overrides_by_glob_the_last_match_wins():
    overrides = [
        Override(match="b*", weights=6, activations=7), Override(match="b2", weights=2),
        Override(match="fc", activations=4),
    ]  # fmt: skip
    placement = place(folded(Residual), "edges-8bit", W3A5, overrides)
    assert placement.weights["b1"] == 6
    assert placement.weights["b2"] == 2
    assert placement.weights["a1"] == 3
    assert placement.activations["relu_default_2"] == 7  # what b1 reads
    assert placement.activations["relu_default_3"] == 7
    assert placement.activations["mean_dim"] == 4
    assert placement.weights["fc"] == 8


@pytest.mark.parametrize("match", ["conv*", "b", "x"])
def test_overrides_that_match_nothing_are_refused(match):
    with pytest.raises(UsageError, match="matches no layer.*zsq inspect"):  # noqa: RUF043
        place(folded(Residual), "edges-8bit", W3A5, [Override(match=match, weights=2)])


def test_overrides_name_tensors_too():
    overrides = [
        Override(edge="relu_default_?", activations=2), Override(match="b1", activations=7),
        Override(edge="mean_dim", activations=6),
    ]  # fmt: skip
    placement = place(folded(Residual), "edges-8bit", W3A5, overrides)
    assert placement.activations == {
        "relu_default": 8, "relu_default_1": 2, "relu_default_2": 7, "relu_default_3": 2, "mean_dim": 6,
    }  # fmt: skip
    assert placement.weights == place(folded(Residual), "edges-8bit", W3A5).weights


class Preactivated(nn.Module):
    """A sum that batch norm and an addition read, and no layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, 4), conv(4, 4), conv(4, 4)
        self.bn_a, self.bn_b, self.fc = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(self.bn_a(x).relu())
        x = x + self.b(self.bn_b(x).relu())
        return self.fc(x.mean((2, 3)))


def test_a_tensor_that_no_layer_reads_has_an_override_by_its_name():
    network = folded(Preactivated)
    assert place(network, "edges-8bit", W3A5).activations["add_tensor"] == 5
    for override in (
        Override(match="*", activations=3),
        Override(edge="add_tensor", activations=3),
    ):
        found = place(network, "edges-8bit", W3A5, [override]).activations["add_tensor"]
        assert found == (3 if override.edge else 5)


@pytest.mark.parametrize("edge", ["relu", "stem", "a1", "x"])
def test_overrides_of_tensors_that_are_not_quantized_are_refused(edge):
    with pytest.raises(
        UsageError, match=r"matches no tensor .* relu_default, .* and 2 more; `zsq inspect"
    ):
        place(folded(Residual), "edges-8bit", W3A5, [Override(edge=edge, activations=2)])


def test_extending_keeps_every_choice_and_covers_every_edge():
    network = folded(Residual)
    overrides = [Override(match="b1", activations=3)]
    own = place(network, "edges-8bit", W3A5, overrides)
    whole = extend_to_integer(network, own)
    assert whole.protocol == "integer"
    assert whole.weights == own.weights
    assert whole.activations.keys() == EXPECTED[Residual]["integer"].keys()
    added = whole.activations.keys() - own.activations.keys()
    assert {whole.activations[n] for n in added} == {8}
    assert all(whole.activations[n] == b for n, b in own.activations.items())


def test_extending_the_integer_placement_changes_nothing():
    network = folded(Concat)
    placement = place(network, "integer", W3A5)
    again = extend_to_integer(network, placement)
    assert (again.activations, again.shared) == (placement.activations, placement.shared)


def test_unknown_protocols_and_networks_without_layers_are_refused():
    with pytest.raises(UsageError, match="choose one of edges-8bit, integer, all-low-bit"):
        place(folded(Residual), "gptq", W3A5)
    bare = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="nothing to quantize"):
        place(network_of(bare), "edges-8bit", W3A5)


def test_one_layer_alone_is_first_and_last():
    placement = place(
        network_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 5))), "edges-8bit", W3A5
    )
    assert list(placement.weights.values()) == [8]
    assert placement.activations == {}


def test_a_layer_called_twice_is_quantized_once():
    module = Net(lambda n, x: n.b(n.b(n.a(x)).relu()).relu(), a=conv(), b=conv(4, 4))
    placement = place(network_of(module), "edges-8bit", W3A5)
    assert placement.weights == {"a": 8, "b": 3, "fc": 8}
