# SPDX-License-Identifier: Apache-2.0
"""Networks whose tensors carry channels on other axes than the second, of sizes that would hide a mistake."""

import pytest
import torch
from torch import nn

import zsq
from zsq import preparation
from zsq.artifact.networkfile import load_saved_teacher, save_teacher
from zsq.errors import RunError
from zsq.synthesis.images import ImageSet
from zsq.teacher.channels import channel_axes
from zsq.teacher.equalize import equalized, find_streams
from zsq.teacher.fold import find_pairs, fold_batch_norms
from zsq.teacher.layers import operator_name
from zsq.teacher.teacher import load_teacher

SHAPE = (3, 8, 8)


def stem(channels):
    """A convolution whose channels have very different sizes."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.logspace(-1.5, 0.5, channels)[torch.randperm(channels)])
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), norm, nn.ReLU())


class Net(nn.Module):
    """A stem, something that a linear layer or another one reads, and a classifier."""

    def __init__(self, channels, turn, width, *middle):
        super().__init__()
        self.stem, self.turn = stem(channels), turn
        self.middle = nn.Sequential(*middle)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.middle(self.turn(self.stem(x))).flatten(2).mean(2))


NETWORKS = {
    "linear over as many positions as channels": lambda: Net(64, lambda y: y.flatten(2), 64, nn.Linear(64, 7)),
    "linear over a map as wide as it has channels": lambda: Net(
        8, lambda y: y, 8, nn.Linear(8, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    ),
    "batch norm of maps after such a linear layer": lambda: Net(
        8, lambda y: y, 8, nn.Linear(8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    ),
    "batch norm of tokens after a linear layer": lambda: Net(
        16, lambda y: y.flatten(2), 16, nn.Linear(64, 6), nn.BatchNorm1d(16), nn.ReLU()
    ),
    "channels averaged away": lambda: Net(
        8, lambda y: y.mean(1, keepdim=True).expand(-1, 8, -1, -1), 8, nn.Conv2d(8, 8, 1), nn.ReLU()
    ),
    "channels cut up": lambda: Net(4, lambda y: y.reshape(y.shape[0], 64, 4), 64, nn.Linear(4, 3)),
    "an addition that stretches": lambda: Net(
        8, lambda y: y + y.mean(1, keepdim=True), 8, nn.Conv2d(8, 8, 1), nn.ReLU()
    ),
    "tokens through two layers": lambda: Net(
        8, lambda y: y.flatten(2).transpose(1, 2), 64, nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)
    ),
}  # fmt: skip


def model(name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_folding_and_equalizing_change_nothing(name, strength):
    net, x = model(name), torch.randn(16, *SHAPE)
    teacher = load_teacher(net, input_shape=SHAPE)
    with torch.no_grad():
        wanted = net(x)
    ready = equalized(teacher, x, strength)
    assert torch.allclose(ready(x), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert torch.allclose(fold_batch_norms(teacher.network)(x), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_of_eight_bits_is_near_the_users_own_network(name):
    net, x = model(name), torch.randn(64, *SHAPE)
    settings = ["tuning.steps=2", "tuning.batch=8"]
    student = zsq.quantize(
        net, "genie", bits="w8a8", images=x, input_shape=SHAPE, settings=settings, compile=False
    )
    with torch.no_grad():
        wanted, found = net(x), student(x)
    assert float((found - wanted).norm() / (wanted - wanted.mean(0)).norm()) < 0.2


def test_hidden_tokens_are_equalized_on_the_last_axis():
    network = load_teacher(model("tokens through two layers"), input_shape=SHAPE).network
    axes = {
        operator_name(n.target): axis
        for n, axis in channel_axes(network).items()
        if n.op != "call_module"
    }
    assert axes["aten.relu.default"] == 2
    (stream,) = (s for s in find_streams(network) if s.channels(network) == 16)
    assert set(stream.axes.values()) == {2}


def test_pairs_are_of_one_axis():
    pairs = {
        name: len(find_pairs(load_teacher(model(name), input_shape=SHAPE).network))
        for name in NETWORKS
    }
    assert pairs == dict.fromkeys(NETWORKS, 1), (
        "the stem's, and none of a linear layer's on maps or tokens"
    )
    flat = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)
    )
    assert len(find_pairs(load_teacher(flat.eval(), input_shape=SHAPE).network)) == 1


@pytest.mark.parametrize(
    "name", ["tokens through two layers", "linear over as many positions as channels"]
)
def test_a_saved_network_knows_its_axes(name, tmp_path):
    teacher = load_teacher(model(name), input_shape=SHAPE)
    save_teacher(teacher, tmp_path / "teacher.safetensors")
    again = load_saved_teacher(tmp_path / "teacher.safetensors")

    def described(network):
        return [
            (s.tensors[0].name, sorted((n.name, axis) for n, axis in s.axes.items()))
            for s in find_streams(network)
        ]

    assert described(again.network) == described(teacher.network)


def test_a_preparation_that_changes_the_network_is_refused(monkeypatch):
    net = model("tokens through two layers")
    teacher = load_teacher(net, input_shape=SHAPE)

    def wrong(teacher, *arguments, **named):
        ready = equalized(teacher, *arguments, **named)
        ready.network.get_submodule("fc").weight.mul_(1.1)
        return ready

    monkeypatch.setattr(preparation, "equalized", wrong)
    images = ImageSet(torch.randn(8, *SHAPE), torch.zeros(8, dtype=torch.long))
    with pytest.raises(RunError, match="changed the network"):
        zsq.prepare(teacher, "genie", images)
