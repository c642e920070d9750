# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.families import FAMILIES, read
from helpers.networks import Residual, SqueezeExcite, images, network_of
from helpers.oddities import NETS

from zsq.errors import UsageError
from zsq.teacher.pieces import cut_piece, nodes_up_to
from zsq.teacher.units import find_units


def chain(network, x):
    for unit in find_units(network):
        x = cut_piece(network, unit.nodes, unit.nodes[-1])(x)
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_units_chain_to_the_network(family):
    _, network, x = read(family)
    with torch.no_grad():
        assert torch.equal(chain(network, x), network(x))


@pytest.mark.parametrize("name", ["windows", "attention", "chunk", "copy into new memory"])
def test_pieces_bring_the_sizes_and_constants_they_need(name):
    network = network_of(NETS[name]())
    for count in (1, 5):
        x = images(count=count)
        assert torch.equal(chain(network, x), network(x))


def test_a_piece_shares_its_modules_with_the_network():
    network = network_of(Residual())
    unit = find_units(network)[1]
    piece = cut_piece(network, unit.nodes, unit.nodes[-1])
    for path in unit.layers:
        assert piece.get_submodule(path) is network.get_submodule(path)
    assert not any(name.startswith("fc") for name, _ in piece.named_modules())


def test_a_piece_that_reads_two_tensors_is_refused():
    network = network_of(SqueezeExcite())
    product = next(n.name for n in network.graph.nodes if "mul" in n.name)
    with pytest.raises(UsageError, match="reads 2 tensors"):
        cut_piece(network, [product], product)


def test_the_way_to_a_node_is_all_it_depends_on():
    network = network_of(Residual())
    names = nodes_up_to(network, "a2")
    assert set(names) >= {"x", "stem", "a1", "a2"}
    assert not {"proj", "a2_bn", "b1", "fc"} & set(names)
    order = [n.name for n in network.graph.nodes]
    assert names == sorted(names, key=order.index)
    piece = cut_piece(network, names, "a2")
    module = Residual()
    module.load_state_dict(network.state_dict(), strict=False)
    module.eval()
    x = images()
    y = module.relu(module.a1_bn(module.a1(module.relu(module.stem_bn(module.stem(x))))))
    assert torch.allclose(piece(x), module.a2(y), atol=1e-6)
