# SPDX-License-Identifier: Apache-2.0
import copy
from functools import cache

import pytest
import torch
from helpers.families import compose, randomise
from helpers.networks import Net, conv, images, network_of
from helpers.oddities import NETS
from torch import nn

from zsq.errors import UsageError
from zsq.teacher.fold import fold_batch_norms
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.layers import BatchNorm, Layer
from zsq.teacher.units import find_units


@cache
def read(name):
    torch.manual_seed(0)
    module = randomise(NETS[name]())
    before = copy.deepcopy(module.state_dict())
    network = build_network(export_module(module, (3, 8, 8)))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    return module, network


even_kernel = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@even_kernel
@pytest.mark.parametrize("name", NETS)
def test_outputs_units_and_folded_outputs_equal_the_modules(name):
    module, network = read(name)
    x = images()
    with torch.no_grad():
        expected = module(x.clone())
        kept = x.clone()
        assert torch.allclose(network(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(x, kept), "a network never writes into its input"
        assert torch.equal(compose(network, find_units(network), x), network(x))
        folded = fold_batch_norms(network)
        assert torch.allclose(folded(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(compose(folded, find_units(folded), x), folded(x))


@even_kernel
@pytest.mark.parametrize("name", NETS)
def test_every_layer_gets_a_gradient(name):
    network = copy.deepcopy(read(name)[1]).requires_grad_()
    network(images()).square().sum().backward()
    for path in leaves(network, Layer):
        gradient = network.get_submodule(path).weight.grad
        assert float(gradient.abs().sum()) > 0, path


def leaves(network, kind):
    return [path for path, part in network.named_modules() if isinstance(part, kind)]


def targets(network):
    return [str(node.target) for node in network.graph.nodes if node.op == "call_function"]


def test_no_operator_writes_in_place_and_contiguity_copies_are_gone():
    for name in ("in place", "write into a slice", "channel shuffle", "dropout"):
        for target in targets(read(name)[1]):
            assert "_." not in target, target
            assert not any(w in target for w in ("contiguous", "clone", "dropout", "aten.view"))


def test_reused_convolution_is_one_layer_called_twice():
    network = read("reused convolution")[1]
    assert leaves(network, Layer) == ["a", "b", "fc"]
    assert [n.target for n in network.graph.nodes if n.op == "call_module"] == ["a", "b", "b", "fc"]


def test_batch_norm_with_its_activation_is_a_batch_norm_at_its_own_path():
    network = read("batch norm with its activation")[1]
    assert leaves(network, BatchNorm) == ["bn"]
    assert "aten.relu.default" in targets(network)


def test_batch_norm_without_statistics_is_no_batch_norm():
    network = read("batch norm without statistics")[1]
    assert leaves(network, BatchNorm) == []


@pytest.mark.parametrize("name", ["weight-standardised", "weight norm"])
def test_what_depends_on_parameters_only_is_computed_once(name):
    _, network = read(name)
    assert leaves(network, Layer) == ["c", "fc"]
    assert not any("std" in t or "norm" in t or "div" in t for t in targets(network))
    if name == "weight-standardised":
        weight = network.get_submodule("c").weight
        assert torch.allclose(weight.mean((1, 2, 3)), torch.zeros(4), atol=1e-6)
        assert torch.allclose(weight.std((1, 2, 3)), torch.ones(4), atol=1e-3)


def test_layers_are_found_behind_a_write_into_a_view_and_inside_no_grad():
    for name in ("write into a slice", "no_grad inside"):
        network = read(name)[1]
        assert leaves(network, Layer) == ["c", "fc"]
        assert leaves(network, BatchNorm) == ["bn"]


def test_parameters_are_copies_and_frozen():
    module = Net(lambda n, x: n.bn(n.c(x)), c=conv(), bn=nn.BatchNorm2d(4))
    network = network_of(module)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    expected = network(images())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bn.running_mean.fill_(3)
    assert torch.equal(network(images()), expected)


def test_every_batch_size_works():
    for name in ("windows", "attention", "channel shuffle", "accumulate into zeros"):
        network = read(name)[1]
        x = images(count=7)
        assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-5)


def test_exporting_leaves_the_mode_of_every_part_alone():
    module = Net(lambda n, x: n.d(n.bn(n.c(x))), c=conv(), bn=nn.BatchNorm2d(4), d=nn.Dropout())
    module.train()
    module.bn.eval()  # a frozen batch norm in a network that is being trained
    modes = {name: part.training for name, part in module.named_modules()}
    export_module(module, (3, 8, 8))
    with pytest.raises(UsageError):
        export_module(module, (4, 8, 8))
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert modes["c"]
    assert not modes["bn"]


def test_nodes_know_their_module():
    network = network_of(Net(lambda n, x: n.s(x), s=nn.Sequential(conv(), nn.ReLU())))
    paths = {str(n.target): n.meta["path"] for n in network.graph.nodes if n.op != "output"}
    assert paths["s.0"] == "s.0"
    assert paths["aten.relu.default"] == "s.1"
