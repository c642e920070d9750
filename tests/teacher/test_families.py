# SPDX-License-Identifier: Apache-2.0
"""Reading, folding and splitting the networks that people have, family by family."""

from collections import Counter

import pytest
import torch
from helpers.families import FAMILIES, compose, construct, read
from torch import nn

from zsq.teacher.fold import find_pairs, fold_batch_norms
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.inspect import inspect_teacher
from zsq.teacher.layers import BatchNorm, Layer
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import ModelInfo, Teacher
from zsq.teacher.units import find_units

#: Batch norms with a layer before them that nothing else reads, where that is not all of them.
FOLDABLE = {"preresnet": 5, "densenet": 5, "dpn": 7, "wrn_cifar": 3, "xdensenet_cifar": 4}
#: Families that make weights out of their parameters: a shortcut added to them, a mask on them.
DERIVED_WEIGHTS = {"diracnetv2", "xdensenet_cifar"}
WITHOUT_BATCH_NORM = {"diracnetv2", "nin_cifar", "squeezenet"}


def counts(module, kinds):
    return sum(isinstance(part, kinds) for part in module.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_unchanged(family):
    module, network, x = read(family)
    with torch.no_grad():
        expected = module(x)
        assert expected.std(0).max() > 1e-3, "a network that ignores its input shows nothing"
        assert torch.allclose(network(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(network(x[:1]), expected[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_batch_norm_is_found_under_its_own_name(family):
    module, network, _ = read(family)
    for theirs, ours in (((nn.Conv2d, nn.Linear), Layer), (nn.BatchNorm2d, BatchNorm)):
        expected = {n: m.weight for n, m in module.named_modules() if isinstance(m, theirs)}
        found = {n: m.weight for n, m in network.named_modules() if isinstance(m, ours)}
        assert set(found) == set(expected)
        if family not in DERIVED_WEIGHTS or ours is BatchNorm:
            assert all(torch.equal(found[n], expected[n]) for n in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_outputs_unchanged(family):
    module, network, x = read(family)
    total = counts(module, nn.BatchNorm2d)
    pairs = find_pairs(network)
    assert (total == 0) == (family in WITHOUT_BATCH_NORM)
    assert len(pairs) == FOLDABLE.get(family, total)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    folded = fold_batch_norms(network)
    assert counts(folded, BatchNorm) == total - len(pairs)
    with torch.no_grad():
        expected = module(x)
        assert float((folded(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    after = network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "the teacher stays as it is"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("folded", [False, True])
def test_units_compose_to_the_network(family, folded):
    _, network, x = read(family)
    network = fold_batch_norms(network) if folded else network
    units = find_units(network)
    layers = [n for n, m in network.named_modules() if isinstance(m, Layer)]
    assert sorted(path for unit in units for path in unit.layers) == sorted(layers)
    assert all(unit.layers for unit in units)
    assert len({node for unit in units for node in unit.nodes}) == sum(len(u.nodes) for u in units)
    with torch.no_grad():
        assert torch.equal(compose(network, units, x), network(x))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_BATCH_NORM])
def test_taps_see_what_hooks_see(family):
    module, network, x = read(family)
    seen = {}
    hooks = [  # an in-place activation may overwrite what a hook was shown: keep copies
        part.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].clone()})
        )
        for name, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    tapped, targets = tap_batch_norms(network)
    with torch.no_grad():
        inputs = tapped(x)
    assert [t.path for t in targets] == list(seen)
    for target, ours in zip(targets, inputs, strict=True):
        norm = module.get_submodule(target.path)
        assert torch.allclose(ours, seen[target.path], rtol=1e-4, atol=1e-5)
        assert torch.equal(target.mean, norm.running_mean)
        assert torch.allclose(target.std**2, norm.running_var + 1e-6, rtol=1e-6)


# --- the table of the notes: unit counts and layers per unit, full depth, few channels -----------


def widths(*depths, base=8):
    return [[base * 2**i] * depth for i, depth in enumerate(depths)]


TABLE = {
    "resnet18": (
        ("resnet", "ResNet", widths(2, 2, 2, 2), 8, False, False),
        [1, 2, 2, 3, 2, 3, 2, 3, 2, 1],
    ),
    "resnet50": (
        ("resnet", "ResNet", widths(3, 4, 6, 3, base=16), 8, True, False),
        [1, 4, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 4, 3, 3, 1],
    ),
    "mobilenetv2": (
        (
            *("mobilenetv2", "MobileNetV2"),
            *([[8], [12] * 2, [16] * 3, [20] * 4 + [24] * 3, [28] * 3 + [32]], 8, 24, True),
        ),
        [1, 2, *[3] * 16, 1, 1],
    ),
    "mobilenet": (
        ("mobilenet", "MobileNet", [[8], [12], [16] * 2, [20] * 2, [24] * 6, [28] * 2], False),
        [1, *[2] * 13, 1],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_units_are_the_blocks_that_hand_written_lists_name(name):
    construction, expected = TABLE[name]
    module = construct(*construction)
    units = find_units(build_network(export_module(module, (3, 64, 64))))
    assert [len(unit.layers) for unit in units] == expected


def test_units_bear_the_names_of_the_blocks():
    module = construct(*TABLE["resnet18"][0])
    units = find_units(build_network(export_module(module, (3, 32, 32))))
    stages = [f"features.stage{s}.unit{u}" for s in range(1, 5) for u in (1, 2)]
    for stage, unit in zip(stages, units[1:-1], strict=True):
        assert unit.name == (stage if len(unit.layers) == 3 else f"{stage}.body")
    assert [units[0].name, units[-1].name] == ["features.init_block.conv.conv", "output"]


@pytest.mark.parametrize("family", FAMILIES)
def test_inspection_lists_every_tensor_that_a_protocol_quantizes(family):
    _, network, x = read(family)
    info = ModelInfo(family, tuple(x.shape[1:]), None, None)
    facts = inspect_teacher(Teacher(network, info))
    for protocol, counts in facts.protocols.items():
        bits = [t["bits"][protocol] for t in facts.tensors if t["bits"][protocol]]
        assert Counter(f"{b} bits" for b in bits) == counts["activations"]
    for tensor in facts.tensors:
        assert tensor["read_by"], tensor["name"]
        assert all(tensor["read_by"]), tensor["name"]
