# SPDX-License-Identifier: Apache-2.0
"""Sizes of channels from batch norms alone, against drawn numbers and a network's own activations."""

import pytest
import torch
from helpers.networks import Concat, Inverted, Residual, smooth_images
from helpers.students import teacher_of, values
from torch import nn

from zsq.teacher.equalize import equalized
from zsq.teacher.moments import Moments, channel_squares, rectified
from zsq.teacher.teacher import load_teacher


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1.5, 0.5), (-2, 1), (-0.3, 2), (4, 1)])
def test_rectified_moments_are_those_of_drawn_numbers(mean, deviation):
    x = mean + deviation * torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    wanted = torch.relu(x)
    found = rectified(Moments(torch.tensor([float(mean)]), torch.tensor([float(deviation) ** 2])))
    assert float(found.mean) == pytest.approx(float(wanted.mean()), abs=0.005)
    assert float(found.variance) == pytest.approx(float(wanted.var()), abs=0.01)


def test_a_channel_that_never_varies_is_rectified_exactly():
    found = rectified(Moments(torch.tensor([2.0, -2.0]), torch.zeros(2)))
    torch.testing.assert_close(found.mean, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(found.variance, torch.zeros(2), atol=1e-6, rtol=0)


class Normal(nn.Module):
    """Batch norms put out what is drawn for them: independent normal numbers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        for bn in (self.bn1, self.bn2):
            bn.weight.data, bn.bias.data = torch.linspace(0.2, 2, 8), torch.linspace(-1, 1, 8)
        for conv in (self.conv1, self.conv2):
            nn.init.ones_(conv.weight)

    def forward(self, x):
        first, second = x.chunk(2, 1)
        x = torch.relu(self.bn1(self.conv1(first))) + self.bn2(self.conv2(second))
        return self.head(torch.relu(x).mean((2, 3)))


def test_sums_and_relus_of_normal_channels_have_the_sizes_that_are_computed():
    teacher = load_teacher(Normal(), input_shape=(16, 8, 8))
    found = channel_squares(teacher.network)
    x = torch.randn(2000, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = values(teacher.network, x)
    names = [n for n in found if n.startswith(("relu", "bn"))]
    assert len(names) == 4
    assert any(n.startswith("add") for n in found)
    for name in names:
        measured = seen[name].square().mean((0, 2, 3))
        # what is rectified twice is no longer normal
        tolerance = 0.1 if name == "relu_default_1" else 0.03
        torch.testing.assert_close(found[name], measured, rtol=tolerance, atol=0.01)


def test_what_batch_norms_say_nothing_of_is_missing():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.relu(self.conv(torch.relu(self.bn(x)))).mean((2, 3)))

    found = channel_squares(teacher_of(Bare).network)
    assert "relu_default" in found
    assert "relu_default_1" not in found
    assert "conv" not in found


@pytest.mark.parametrize("make", [Residual, Inverted, Concat])
@pytest.mark.parametrize("fold", [False, True])
def test_networks_equalized_without_images_compute_the_same(make, fold):
    teacher, x = teacher_of(make), smooth_images(8)
    with torch.no_grad():
        torch.testing.assert_close(
            equalized(teacher, None, 1.0, fold=fold)(x), teacher(x), atol=1e-5, rtol=1e-4
        )


def test_channels_inside_a_block_become_more_alike_without_images():
    teacher, x = teacher_of(Residual), smooth_images(64)
    teacher.network.get_submodule("a1_bn").weight.data *= torch.tensor([0.2, 1, 3, 1, 0.5, 2])
    spread = []
    for network in (teacher.network, equalized(teacher, None, 1.0, fold=False).network):
        sizes = values(network, x)["relu_default_1"].square().mean((0, 2, 3)).sqrt()
        spread.append(float(sizes.max() / sizes.min()))
    assert spread[1] < 0.5 * spread[0]
