# SPDX-License-Identifier: Apache-2.0
"""Heads and blocks that people build, from end to end: every layer in integers, answers as simulated."""

import json

import pytest
import torch
from helpers.networks import with_own_statistics
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import zsq
from zsq.config import Bits
from zsq.errors import RunError, UsageError
from zsq.quantizers.protocol import place
from zsq.teacher.teacher import load_teacher

SHAPE = (3, 8, 8)


def body():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()
    )  # fmt: skip


class Net(nn.Module):
    """A body, parts by name, and how they go on from the body's maps, (N, 8, 4, 4)."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.body, self.then = body(), forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.then(self, self.body(x))


def tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def attended(net, maps):
    query, key, value = net.qkv(tokens(maps)).chunk(3, -1)
    return net.fc(scaled_dot_product_attention(query, key, value).mean(1))


def einsum_attended(net, maps):
    query, key, value = net.qkv(tokens(maps)).chunk(3, -1)
    scores = torch.einsum("bic,bjc->bij", query, key).softmax(-1)
    return net.fc(torch.einsum("bij,bjc->bic", scores, value).mean(1))


def self_attended(net, maps):
    sequence = tokens(maps)
    return net.fc((sequence + net.mha(sequence, sequence, sequence)[0]).mean(1))


def feed_forward(net, maps):
    sequence = tokens(maps)
    return net.fc((sequence + net.down(net.up(sequence).relu())).mean(1))


def normed(maps):
    """A layer norm over channels as ConvNeXt's authors write it."""
    apart = maps - maps.mean(1, keepdim=True)
    return apart / torch.sqrt(apart.pow(2).mean(1, keepdim=True) + 1e-6)


def masked(net, maps):
    """Windows with a mask of their own, as Swin's: a constant of five axes."""
    query, key, value = net.qkv(tokens(maps).reshape(-1, 4, 1, 4, 8)).chunk(3, -1)
    scores = query @ key.transpose(-2, -1) + net.mask.unsqueeze(1).unsqueeze(0)
    return net.fc((scores.softmax(-1) @ value).flatten(1, 3).mean(1))


def sequence_first(net, maps):
    return net.fc(net.layer(maps.flatten(2).permute(2, 0, 1)).mean(0))


def counted(net, maps):
    return net.fc(tokens(maps).reshape(len(maps), -1))


def gated(net, maps):
    return net.fc((maps + 1.0 * torch.sigmoid(net.c(maps)) / 1 + 0.0).mean((2, 3)))


def with_mask():
    net = Net(masked, qkv=nn.Linear(8, 24), fc=nn.Linear(8, 5))
    net.register_buffer("mask", torch.randn(4, 4, 4))
    return net


def whole_map():
    return nn.Conv2d(8, 5, 4)


NETWORKS = {
    "convolution over the map, flattened": lambda: Net(lambda n, y: n.c(y).flatten(1), c=whole_map()),
    "convolution over the map, squeezed": lambda: Net(
        lambda n, y: n.c(y).squeeze(-1).squeeze(-1), c=whole_map()
    ),
    "convolution over the map, indexed": lambda: Net(lambda n, y: n.c(y)[:, :, 0, 0], c=whole_map()),
    "convolution over the map, viewed": lambda: Net(
        lambda n, y: n.c(y).view(y.shape[0], -1), c=whole_map()
    ),
    "attention": lambda: Net(attended, qkv=nn.Linear(8, 24), fc=nn.Linear(8, 5)),
    "attention by einsum": lambda: Net(einsum_attended, qkv=nn.Linear(8, 24), fc=nn.Linear(8, 5)),
    "attention module": lambda: Net(
        self_attended, mha=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 5)
    ),
    "feed-forward on tokens": lambda: Net(
        feed_forward, up=nn.Linear(8, 16), down=nn.Linear(16, 8), fc=nn.Linear(8, 5)
    ),
    "layer norm by hand": lambda: Net(
        lambda n, y: n.fc(n.c(normed(y)).mean((2, 3))), c=nn.Conv2d(8, 8, 1), fc=nn.Linear(8, 5)
    ),
    "windows with masks": with_mask,
    "sequences first": lambda: Net(
        sequence_first, layer=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), fc=nn.Linear(8, 5)
    ),
    "batch size by len": lambda: Net(counted, fc=nn.Linear(128, 5)),
    "factors of one": lambda: Net(gated, c=nn.Conv2d(8, 8, 1), fc=nn.Linear(8, 5)),
    "LSTM": lambda: Net(
        lambda n, y: n.fc(n.lstm(tokens(y))[0][:, -1]), lstm=nn.LSTM(8, 6, batch_first=True), fc=nn.Linear(6, 5)
    ),
    "LSTM's last state": lambda: Net(
        lambda n, y: n.fc(n.lstm(tokens(y))[1][0][-1]), lstm=nn.LSTM(8, 6, batch_first=True), fc=nn.Linear(6, 5)
    ),
    "GRU": lambda: Net(
        lambda n, y: n.fc(n.gru(tokens(y))[0].mean(1)), gru=nn.GRU(8, 6, batch_first=True), fc=nn.Linear(6, 5)
    ),
}  # fmt: skip


#: Networks whose file computes every answer as the simulation does, to the bit.
EXACT = {"factors of one", "convolution over the map, flattened", "feed-forward on tokens"}


def quantized(net, out, **more):
    torch.manual_seed(1)
    return zsq.quantize(
        net, "genie", bits="w8a8", images=torch.randn(48, *SHAPE), input_shape=SHAPE, out=out, report=False,
        settings=["tuning.steps=2", "tuning.batch=8"], compile=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_runs_as_integers_and_near_its_float_self(name, tmp_path):
    torch.manual_seed(0)
    net = with_own_statistics(NETWORKS[name](), SHAPE).eval()
    student = quantized(net, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "run.json").read_text())["results"]["export"]
    assert report["fused"] == report["convs"] > 0
    assert report["fused_matmuls"] == report["matmuls"]
    assert report["agreement"] == 100
    assert report["identical"] == 100 or name not in EXACT
    x = torch.randn(64, *SHAPE)
    with torch.no_grad():
        wanted, found = net(x), student(x)
    assert float((found - wanted).norm() / (wanted - wanted.mean(0)).norm()) < 0.2


def test_a_padded_convolution_is_not_taken_for_one_over_the_map(tmp_path):
    """Its kernel is as large as the map and its result one value, which sees other pixels."""
    torch.manual_seed(0)
    padded = Net(lambda n, y: n.c(y).flatten(1), c=nn.Conv2d(8, 5, 4, stride=3, padding=1))
    with pytest.raises(RunError, match=r"would run in float.*zsq export RUN --allow-partial"):
        quantized(with_own_statistics(padded, SHAPE).eval(), tmp_path / "run")
    report = zsq.export(tmp_path / "run", allow_partial=True)
    assert report.agreement == 100


def test_a_file_of_the_run_is_not_written_over(tmp_path):
    torch.manual_seed(0)
    net = with_own_statistics(NETWORKS["convolution over the map, flattened"](), SHAPE).eval()
    quantized(net, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    for name in ("student.safetensors", "run.json", "model"):
        with pytest.raises(UsageError, match=r"ends in \.onnx"):
            zsq.export(tmp_path / "run", path=tmp_path / "run" / name)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == before


def test_images_of_one_pixel(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )
    student = zsq.quantize(
        net.eval(), "genie", bits="w8a8", input_shape=(8, 1, 1), compile=False,
        settings=["synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2", "tuning.steps=2", "tuning.batch=4"],
    )  # fmt: skip
    assert student(torch.randn(3, 8, 1, 1)).isfinite().all()


def test_variances_roots_and_denominators_stay_float():
    """On a linear grid of 256 codes a small variance is 0; what a layer reads is quantized all the same."""
    torch.manual_seed(0)
    net = with_own_statistics(NETWORKS["layer norm by hand"](), SHAPE).eval()
    network = load_teacher(net, input_shape=SHAPE).network
    placed = place(network, "integer", Bits(weights=8, activations=8)).activations
    kinds = {n.name: str(n.target) for n in network.graph.nodes}
    quantized_kinds = [kinds[name] for name in placed]
    assert not any(kind.startswith(("aten.sqrt", "aten.pow")) for kind in quantized_kinds)
    assert sum(kind.startswith("aten.sub") for kind in quantized_kinds) == 1
    assert sum(kind.startswith("aten.div") for kind in quantized_kinds) == 1
    variance = [
        n for n in network.graph.nodes if str(n.target).startswith(("aten.mean", "aten.add"))
    ]
    names = [
        n.name
        for n in variance
        if any("sqrt" in str(u.target) or "add" in str(u.target) for u in n.users)
    ]
    assert len(names) == 2
    assert not set(names) & set(placed)


def test_layers_of_sequences_are_not_tuned_one_by_one():
    torch.manual_seed(0)
    net = with_own_statistics(NETWORKS["sequences first"](), SHAPE).eval()
    with pytest.raises(UsageError, match=r"tuning\.unit=block"):
        zsq.quantize(
            net, "genie", bits="w8a8", images=torch.randn(8, *SHAPE), input_shape=SHAPE, compile=False,
            settings=["tuning.steps=2", "tuning.batch=4", "tuning.unit=layer"],
        )  # fmt: skip


def test_transposed_convolutions_are_named_as_the_reason(tmp_path):
    torch.manual_seed(0)
    net = Net(
        lambda n, y: n.fc(n.up(y).mean((2, 3))),
        up=nn.ConvTranspose2d(8, 8, 2, 2),
        fc=nn.Linear(8, 5),
    )
    with pytest.raises(RunError, match="does not quantize transposed convolutions"):
        quantized(with_own_statistics(net, SHAPE).eval(), tmp_path / "run")
