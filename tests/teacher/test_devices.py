# SPDX-License-Identifier: Apache-2.0
"""Networks that name no device compute where their input is."""

import pytest
import torch
from helpers.emulated_gpu import DEVICE, emulated_gpu
from helpers.networks import conv, with_own_statistics
from torch import nn

from zsq.artifact.networkfile import load_saved_teacher, save_teacher
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.teacher import load_teacher


class Extended(nn.Module):
    """Adds two channels, made somehow, to four that are learned."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.first, self.norm = conv(3, 4), nn.BatchNorm2d(4)
        self.second, self.last = conv(6, 4), nn.Linear(4, 5)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        y = torch.cat([y, self.extra(y)], 1)
        return self.last(torch.relu(self.second(y)).mean((2, 3)))


def shape(y, channels=2):
    return y.shape[0], channels, *y.shape[2:]


EXTRAS = {
    "zeros": lambda y: torch.zeros(shape(y), device=y.device),
    "zeros wherever": lambda y: torch.zeros(shape(y)),
    "ones and a half": lambda y: torch.cat(
        [torch.ones(shape(y, 1), device=y.device), torch.full(shape(y, 1), 0.5)], 1
    ),
    "whole numbers": lambda y: torch.full(shape(y), 3, device=y.device).float() / 2,
    "truths": lambda y: torch.full(shape(y), True).to(y.device, torch.float32),
    "empty": lambda y: torch.empty(shape(y), device=y.device).fill_(2.0),
    "doubles": lambda y: torch.zeros(shape(y), dtype=torch.float64, device=y.device).float(),
    "moved": lambda y: y[:, :2].to(y.device) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1),
    "moved and cast": lambda y: y[:, :2].to("cpu", torch.float64).float(),
    "used twice": lambda y: (z := torch.zeros(shape(y), device=y.device)) + y[:, 2:] + z,
    "like": lambda y: torch.ones_like(y[:, :2], device=y.device),
    "counted": lambda y: torch.arange(2.0, device=y.device).view(1, 2, 1, 1) * y[:, :2],
}


@pytest.fixture(params=EXTRAS)
def module(request):
    torch.manual_seed(0)
    return with_own_statistics(Extended(EXTRAS[request.param])).eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_computes_what_its_module_does(module, batch):
    network = build_network(export_module(module, (3, 8, 8)))
    x = torch.randn(batch, 3, 8, 8)
    torch.testing.assert_close(network(x), module(x))


def test_a_network_computes_where_its_input_is(module):
    network = build_network(export_module(module, (3, 8, 8)))
    x = torch.randn(2, 3, 8, 8)
    with emulated_gpu():
        there = network.to(DEVICE)(x.to(DEVICE))
        assert there.device == DEVICE
        found = there.cpu()
    torch.testing.assert_close(found, module(x))


def test_a_network_is_saved_without_a_device(module, tmp_path):
    teacher = load_teacher(module, input_shape=(3, 8, 8))
    save_teacher(teacher, tmp_path / "teacher.safetensors")
    again = load_saved_teacher(tmp_path / "teacher.safetensors")
    assert "device(" not in "".join(str(n.args) + str(n.kwargs) for n in again.network.graph.nodes)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.network(x), teacher.network(x))
