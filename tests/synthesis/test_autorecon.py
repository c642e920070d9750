# SPDX-License-Identifier: Apache-2.0
"""AutoReCon's architectures and generators, against the published tables and a plain reference."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from zsq.errors import UsageError
from zsq.synthesis.architecture import (
    Architecture,
    Cell,
    default_architecture,
    published_architectures,
)
from zsq.synthesis.autorecon import AutoReconGenerator, CellNetwork
from zsq.synthesis.labels import plain_labels, superposed_labels


def test_the_published_tables_are_complete():
    found = published_architectures()
    assert set(found) == {"resnet20_cifar10", "resnet20_cifar100", "resnet18", "resnet50",
                          "mobilenetv2"}  # fmt: skip
    for architecture in found.values():
        cells = architecture.cells
        assert sum(len(c.ups) for c in cells) == 6
        assert sum(len(c.operations) for c in cells) == 15
        assert sum(len(c.crosses) for c in cells) == 12
        assert not any("s" in c.operations for c in cells), "skips were never found"
    assert str(found["resnet20_cifar10"].cells[1]) == "NN; d5 d5 c3 d3 d5; 0 0 L 0 0 N"


@pytest.mark.parametrize(
    ("reference", "shape", "expected"),
    [
        ("zsq:resnet20_cifar10", (3, 32, 32), "resnet20_cifar10"),
        ("pytorchcv:resnet20_cifar100", (3, 32, 32), "resnet20_cifar100"),
        ("pytorchcv:resnet50", (3, 224, 224), "resnet50"),
        ("models.py:resnet18_tiny", (3, 64, 64), "resnet20_cifar10"),
        ("net.pt2", (1, 256, 128), "resnet18"),
        ("torchvision:resnet50", (3, 224, 224), "resnet50"),
        ("timm:resnet50", (3, 224, 224), "resnet50"),
        ("timm:resnet50.a1_in1k", (3, 224, 224), "resnet50"),
        ("pytorchcv:mobilenetv2_w1", (3, 224, 224), "mobilenetv2"),
        ("torchvision:mobilenet_v2", (3, 224, 224), "mobilenetv2"),
        ("timm:mobilenetv2_100", (3, 224, 224), "mobilenetv2"),
        ("timm:mobilenetv2_100.ra_in1k", (3, 224, 224), "mobilenetv2"),
        ("module:MobileNetV2", (3, 224, 224), "mobilenetv2"),
        ("timm:mobilenetv2_140.ra_in1k", (3, 224, 224), "resnet18"),  # another network
        ("folder.of/resnet50.pt2", (3, 224, 224), "resnet50"),
        ("timm:resnet50d.ra2_in1k", (3, 224, 224), "resnet18"),
    ],
)
def test_which_one_a_teacher_gets(reference, shape, expected):
    assert default_architecture(shape, reference) == published_architectures()[expected]


def sample(generator, count, classes, mixed=None):
    torch.manual_seed(1)
    device = torch.device("cpu")
    labels = (plain_labels(count, classes, device) if mixed is None
              else superposed_labels(count, classes, mixed, device))  # fmt: skip
    return generator(generator.draw_noise(labels), labels.classes, labels.weights)


@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet20_cifar100", "mobilenetv2"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 20)])
@pytest.mark.parametrize("mixed", [None, 10])
def test_images_have_the_shape_and_are_standardised(name, shape, mixed):
    generator = AutoReconGenerator(published_architectures()[name], 7, shape, channels=8)
    images = sample(generator, 6, 7, mixed)
    assert images.shape == (6, *shape)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(shape[0]), atol=2e-2)


def test_imagenet_sides():
    with torch.device("meta"):
        found = published_architectures()["resnet18"]
        generator = AutoReconGenerator(found, 1000, (3, 224, 224))
        classes = torch.zeros(2, 1, dtype=torch.long)
        images = generator(torch.zeros(2, 100), classes, torch.ones(2, 1))
    assert images.shape == (2, 3, 224, 224)
    count = sum(p.numel() for p in generator.parameters())
    tables = sum(p.numel() for n, p in generator.named_parameters() if p.ndim == 2 and "norm" in n)
    assert 36e6 < count - tables < 40e6
    assert 3.5e6 < tables < 4.5e6


def test_cifar_size_is_two_million():
    generator = AutoReconGenerator(published_architectures()["resnet20_cifar10"], 10, (3, 32, 32))
    assert 1.7e6 < sum(p.numel() for p in generator.parameters()) < 2.3e6


def test_every_parameter_learns():
    generator = AutoReconGenerator(published_architectures()["resnet20_cifar10"], 3, (3, 16, 16), 8)
    torch.manual_seed(0)
    (sample(generator, 12, 3) * torch.randn(12, 3, 16, 16)).sum().backward()
    missing = [n for n, p in generator.named_parameters() if p.grad is None]
    assert missing == []


def reference_edge(edge, x, rows, choice, up):
    """Batch norm, rows of the tables, LeakyReLU and convolution, one image at a time."""
    if choice == "s":
        return x
    if up:
        mode = {"N": "nearest", "L": "bilinear"}[choice]
        options = {"align_corners": False} if mode == "bilinear" else {}
        x = functional.interpolate(x, scale_factor=2, mode=mode, **options)
    y = functional.batch_norm(x, None, None, training=True, eps=0.8)
    y = torch.stack([
        image * edge.norm.weight[r][:, None, None] + edge.norm.bias[r][:, None, None]
        for image, r in zip(y, rows, strict=True)
    ])  # fmt: skip
    size, dilation = (1, 1) if up else (int(choice[1]), 2 if choice[0] == "d" else 1)
    return functional.conv2d(functional.leaky_relu(y, 0.2), edge.conv.weight, edge.conv.bias,
                             padding=dilation * (size - 1) // 2, dilation=dilation)  # fmt: skip


def test_a_cell_against_its_definition():
    torch.manual_seed(0)
    cell = Cell.parse("LN; s d3 c5 0 c1; 0 L 0 N 0 0")
    network = CellNetwork(cell, 4, 5)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    x, rows = torch.randn(3, 5, 4, 4), torch.tensor([2, 0, 3])
    before = [torch.randn(3, 5, 4, 4) for _ in range(4)]
    n0 = reference_edge(network.ups["0"], x, rows, "L", True)
    n1 = reference_edge(network.ups["1"], x, rows, "N", True)
    o, c = network.operations, network.crosses
    n2 = n0 + reference_edge(o["1"], n1, rows, "d3", False)
    n2 = n2 + reference_edge(c["1"], before[1], rows, "L", True)
    n3 = reference_edge(o["2"], n0, rows, "c5", False) + reference_edge(
        o["4"], n2, rows, "c1", False
    )
    n3 = n3 + reference_edge(c["3"], before[0], rows, "N", True)
    found = network(x, before, rows[:, None], torch.ones(3, 1))
    for ours, theirs in zip(found, (n0, n1, n2, n3), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_none_edges_are_not_built():
    network = CellNetwork(Cell.parse("NN; 0 0 d5 0 0"), 4, 5)
    assert list(network.operations) == ["2"]
    nodes = network(
        torch.randn(2, 5, 4, 4), (), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    )
    assert nodes[2] is None
    assert nodes[3] is not None


def test_architectures_survive_a_file(tmp_path):
    for name, architecture in published_architectures().items():
        architecture.save(tmp_path / name)
        assert Architecture.load(tmp_path / name) == architecture


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- NN; d5 0 d5 d3 c5", "three cells"),
        ("{a: 1}", "three cells"),
        ("a: [", "cannot be read"),
        ("[NX; d5 0 d5 d3 c5, a, b]", "NX"),
        ("[NN; d5 0 d5 d3 c5, NN; d5 0 d5 d3 c5, NN; d5 0 d5 d3 c5]", "crosses"),
        ("[NN; d5 0 0 0 0, NN; s s s s s; 0 0 0 0 0 0, NN; s s s s s; 0 0 0 0 0 0]", "reaches"),
        ("[NN; d5 0 d7 d3 c5, a, b]", "d7"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(tmp_path, content, says):
    (tmp_path / "cells.yaml").write_text(content)
    with pytest.raises(UsageError, match=says):
        Architecture.load(tmp_path / "cells.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="published, search"):
        Architecture.load(tmp_path / "nowhere.yaml")
