# SPDX-License-Identifier: Apache-2.0
"""Equalized networks compute the same with channels of similar range."""

import pytest
import torch
from helpers.networks import Concat, Inverted, Residual, smooth_images
from helpers.students import Values, teacher_of
from torch import nn

from zsq.teacher.equalize import equalized, find_streams
from zsq.teacher.fold import fold_batch_norms
from zsq.teacher.layers import BatchNorm
from zsq.teacher.teacher import load_teacher


@pytest.mark.parametrize("make", [Residual, Inverted, Concat])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_outputs_stay_the_same(make, strength):
    teacher = teacher_of(make)
    x = smooth_images(8)
    with torch.no_grad():
        before, after = teacher(x), equalized(teacher, x, strength)(x)
    assert before.std() > 0.01
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def sizes(network, x, name):
    return Values(network, x).seen[name].square().mean((0, 2, 3)).sqrt()


def test_full_strength_makes_the_channels_inside_a_block_equal():
    teacher, x = teacher_of(Residual), smooth_images(64)
    teacher.network.get_submodule("a1_bn").weight.data *= torch.tensor([0.2, 1, 3, 1, 0.5, 2])
    after = equalized(teacher, x, 1.0).network
    inner = next(n for n in after.graph.nodes if "relu" in n.name and n.name != "relu_default")
    before = sizes(fold_batch_norms(teacher.network), x, inner.name)
    alive = before > 1e-3
    spread = sizes(after, x, inner.name)[alive]
    assert before[alive].max() / before[alive].min() > 2
    assert spread.max() / spread.min() < 1.01


def test_a_residual_stream_is_one_and_relu6_and_concatenations_are_left_alone():
    streams = find_streams(fold_batch_norms(teacher_of(Residual).network))
    shapes = sorted((len(s.writers), len(s.readers)) for s in streams)
    # the stem's output; inside either block; the stream of a2, proj and b2, read by b1 and fc
    assert shapes == [(1, 1), (1, 1), (1, 2), (3, 2)]
    for make in (Inverted, Concat):
        network = fold_batch_norms(teacher_of(make).network)
        clipped = {n.name for n in network.graph.nodes if "relu6" in n.name or "hardtanh" in n.name}
        clipped |= {n.name for n in network.graph.nodes if "cat" in n.name}
        touched = {n.name for s in find_streams(network) for n in s.tensors}
        assert clipped
        assert not clipped & touched


def test_the_teacher_is_not_changed():
    teacher, x = teacher_of(Residual), smooth_images(8)
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    equalized(teacher, x, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())


def test_a_network_without_parameters_stays_as_it_is():
    class Pooled(nn.Module):
        def forward(self, x):
            return torch.relu(x).mean((2, 3))

    teacher, x = load_teacher(Pooled(), input_shape=(3, 8, 8)), smooth_images(4)
    torch.testing.assert_close(equalized(teacher, x, 0.5)(x), teacher(x))


class PreActivated(nn.Module):
    """A stem, then a batch norm after an addition, which cannot be folded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(torch.relu(self.bn1(x)))
        return self.head(self.conv2(torch.relu(self.bn2(x))).mean((2, 3)))


@pytest.mark.parametrize("make", [Residual, Inverted, Concat, PreActivated])
@pytest.mark.parametrize("fold", [False, True])
def test_batch_norms_that_stay_take_the_factors(make, fold):
    teacher, x = teacher_of(make), smooth_images(32)
    after = equalized(teacher, x, 1.0, fold=fold)
    with torch.no_grad():
        torch.testing.assert_close(after(x), teacher(x), atol=1e-5, rtol=1e-4)
    norms = dict(teacher.network.named_modules())
    for path, module in after.network.named_modules():
        if isinstance(module, BatchNorm):
            assert torch.equal(module.running_mean, norms[path].running_mean)
            assert torch.equal(module.running_var, norms[path].running_var)


@pytest.mark.parametrize("make", [Residual, PreActivated])
def test_channels_behind_a_batch_norm_that_stays_become_equal(make):
    teacher, x = teacher_of(make), smooth_images(64)
    for module in teacher.network.modules():
        if isinstance(module, BatchNorm):
            module.weight.data *= torch.linspace(0.5, 2, len(module.weight))
    before = sizes(teacher.network, x, "relu_default_1")
    after = sizes(equalized(teacher, x, 1.0, fold=False).network, x, "relu_default_1")
    assert before.max() > 2 * before.min()
    torch.testing.assert_close(after, after.max().expand(len(after)), rtol=1e-2, atol=0)
