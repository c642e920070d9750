# SPDX-License-Identifier: Apache-2.0
import torch
from helpers.families import read
from helpers.networks import Net, Residual, conv, images, network_of
from torch import nn

from zsq.teacher.taps import strided_nodes, tap_batch_norms


def test_targets_are_what_the_norms_stored():
    module = Residual()
    tapped, targets = tap_batch_norms(network_of(module))
    assert [t.path for t in targets] == [
        "stem_bn", "a1_bn", "a2_bn", "proj_bn", "b1_bn", "b2_bn",
    ]  # fmt: skip
    for target in targets:
        norm = module.get_submodule(target.path)
        assert torch.equal(target.mean, norm.running_mean)
        assert torch.allclose(target.std, (norm.running_var + 1e-6).sqrt())
        assert target.std.dtype == torch.float32
    assert len(tapped(images())) == len(targets)


def test_the_tapped_values_are_the_statistics_torch_would_collect():
    """In train mode with momentum 1, torch's own batch norm stores the statistics of its input."""
    module = Net(lambda n, x: n.b(n.c(x)), c=conv(), b=nn.BatchNorm2d(4, momentum=1.0))
    tapped, _ = tap_batch_norms(network_of(module))
    (seen,) = tapped(images(count=6))
    norm = nn.BatchNorm2d(4, momentum=1.0)
    module.b = norm.train()
    module(images(count=6))
    assert torch.allclose(seen.mean((0, 2, 3)), norm.running_mean, atol=1e-6)
    assert torch.allclose(seen.var((0, 2, 3)), norm.running_var, rtol=1e-5)


def test_what_no_norm_needs_is_not_computed():
    module = Net(lambda n, x: n.tail(n.bn(n.c(x))), c=conv(), bn=nn.BatchNorm2d(4), tail=conv(4, 4))
    network = network_of(module)
    tapped, _ = tap_batch_norms(network)
    names = dict(tapped.named_modules())
    assert "c" in names
    assert not {"tail", "fc", "bn"} & set(names)
    assert dict(network.named_modules()).keys() >= {"tail", "fc", "bn"}, "the teacher keeps them"


def test_taps_are_frozen_but_pass_gradients_to_the_images():
    tapped, _ = tap_batch_norms(network_of(Residual()))
    x = images().requires_grad_()
    sum(t.square().sum() for t in tapped(x)).backward()
    assert float(x.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in tapped.parameters())


def test_strided_convolutions_are_found_in_either_direction():
    module = Net(
        lambda n, x: n.d(n.c(n.b(n.a(x)))),
        a=conv(), b=conv(4, 4, stride=(1, 2)), c=conv(4, 4, stride=2), d=conv(4, 4, 1),
    )  # fmt: skip
    assert [n.target for n in strided_nodes(network_of(module))] == ["b", "c"]


def test_resnet_has_the_strided_convolutions_of_the_notes():
    network = read("resnet")[1]  # the stem, and a convolution and a projection in stage 2
    assert {n.target for n in strided_nodes(network)} == {
        "features.init_block.conv.conv",
        "features.stage2.unit1.body.conv1.conv",
        "features.stage2.unit1.identity_conv.conv",
    }


def test_swing_with_the_middle_offset_changes_nothing():
    network = network_of(Residual())
    plain, _ = tap_batch_norms(network)
    swung, _ = tap_batch_norms(network, swing=True)
    x = images()
    for a, b in zip(plain(x), swung(x, torch.ones(2, 2, dtype=torch.long)), strict=True):
        assert torch.equal(a, b)
