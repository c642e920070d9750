# SPDX-License-Identifier: Apache-2.0
"""Examining a set of images: statistics, classes, confidence, diversity."""

import json
import math

import pytest
import torch
from helpers.examined import SHAPE, labelled, sure_teacher, teacher_of
from helpers.networks import Net, conv, network_of, smooth_images
from torch import nn
from torch.nn import functional

from zsq.analysis import observation
from zsq.analysis.images import examine_images
from zsq.errors import UsageError
from zsq.synthesis.images import ImageSet
from zsq.teacher.layers import BatchNorm
from zsq.teacher.teacher import ModelInfo, Teacher


@pytest.fixture(scope="module")
def teacher():
    return sure_teacher()


@pytest.fixture(scope="module")
def diverse(teacher):
    return labelled(teacher, smooth_images(150, seed=4))


def classifier_inputs(teacher, images):
    """Return what the classifier reads and what batch norms read, by hooks."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
        for name, m in teacher.network.named_modules()
    ]
    with torch.no_grad():
        teacher(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_distance_is_that_of_torchs_own_batch_norm(teacher, diverse):
    report = examine_images(teacher, diverse, diverse)
    seen = classifier_inputs(teacher, diverse.images)
    norms = {n: m for n, m in teacher.network.named_modules() if isinstance(m, BatchNorm)}
    assert set(report.images.distances) == set(norms)
    assert len(norms) == 6
    for name, norm in norms.items():
        x = seen[name].double()
        mean, variance = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
        functional.batch_norm(x, mean, variance, training=True, momentum=1.0)
        count = x.numel() / x.shape[1]
        variance *= (count - 1) / count
        expected = (mean - norm.running_mean) ** 2 + (variance - norm.running_var) ** 2
        assert report.images.distances[name] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert report.real == report.images


def test_diversity_by_brute_force(teacher, diverse):
    facts = examine_images(teacher, diverse).images
    features = classifier_inputs(teacher, diverse.images)["fc"].double()
    nearest, within = [], []
    for i in range(len(diverse)):
        distances = [
            1 - float(functional.cosine_similarity(features[i], features[j], dim=0))
            for j in range(len(diverse))
            if j != i
        ]
        nearest.append(min(distances))
        others = [j for j in range(len(diverse)) if j != i]
        within += [
            d for j, d in zip(others, distances, strict=True)
            if diverse.labels[i] == diverse.labels[j]
        ]  # fmt: skip
    middle = sorted(nearest)[74:76]
    assert facts.nearest_distance == pytest.approx(sum(middle) / 2, abs=1e-6)
    assert facts.within_class_distance == pytest.approx(sum(within) / len(within), rel=1e-5)


def test_spread_of_pixels_by_brute_force(teacher, diverse):
    images = diverse.images[:9].double() + torch.linspace(0, 3, 8)
    middle = sum(images) / 9
    between = sum(((x - middle) ** 2).mean() for x in images) / 9
    within_and_between = sum(((x - images.mean()) ** 2).mean() for x in images) / 9
    facts = examine_images(teacher, ImageSet(images.float(), diverse.labels[:9])).images
    assert facts.pixel_spread == pytest.approx(float(between / within_and_between), rel=1e-5)


def test_classes_and_confidence(teacher, diverse):
    labels = diverse.labels.clone()
    labels[:30] = (labels[:30] + 1) % 5
    facts = examine_images(teacher, ImageSet(diverse.images, labels)).images
    top = teacher(diverse.images).softmax(1).max(1).values
    assert facts.class_counts == tuple(int((labels == c).sum()) for c in range(5))
    share = [c / 150 for c in facts.class_counts]
    assert facts.balance == pytest.approx(-sum(p * math.log(p, 5) for p in share))
    assert facts.confirmed == pytest.approx(120 / 150)
    assert facts.confidence == pytest.approx(float(top.mean()), rel=1e-5)
    for share, value in facts.confidence_quantiles.items():
        assert value == pytest.approx(float(top.quantile(float(share))), rel=1e-5)
    assert facts.confidence_histogram == tuple(torch.histc(top, 20, 0, 1).int().tolist())


def test_nan_is_counted_and_left_out(teacher, diverse):
    images = diverse.images.clone()
    images[3, 0, 0, 0], images[70, 1, 2, 2] = math.nan, math.inf
    report = examine_images(teacher, ImageSet(images, diverse.labels))
    kept = torch.ones(150, dtype=torch.bool).index_fill(0, torch.tensor([3, 70]), False)
    rest = examine_images(teacher, ImageSet(diverse.images[kept], diverse.labels[kept]))
    assert (report.images.images, report.images.broken) == (150, 2)
    assert report.images.distances == rest.images.distances
    assert report.images.nearest_distance == rest.images.nearest_distance
    assert any("2 of 150 images hold NaN" in w for w in report.warnings)
    with pytest.raises(UsageError, match=r"all 150 images hold NaN"):
        examine_images(teacher, ImageSet(images * math.nan, diverse.labels))


def test_images_too_large_for_the_teacher_are_reported(teacher, diverse):
    images = diverse.images * 1e38
    report = examine_images(teacher, ImageSet(images, diverse.labels))
    assert report.images.broken == 150
    assert any("batch norms are NaN or Inf" in w for w in report.warnings)
    assert json.dumps(report.to_dict(), allow_nan=False)
    report.plot().canvas.draw()


@pytest.mark.parametrize("size", [1, 7, 150])
def test_passes_do_not_matter(teacher, diverse, monkeypatch, size):
    expected = examine_images(teacher, diverse).to_dict()["images"]
    monkeypatch.setattr(observation, "PASS", size)
    found = examine_images(teacher, diverse).to_dict()["images"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_the_teacher_is_unchanged(teacher, diverse):
    state = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    code, before = teacher.network.code, teacher(diverse.images)
    examine_images(teacher, diverse)
    assert teacher.network.code == code
    assert all(torch.equal(v, state[k]) for k, v in teacher.network.state_dict().items())
    assert torch.equal(teacher(diverse.images), before)


def test_report_as_json_and_as_a_picture(teacher, diverse):
    report = examine_images(teacher, diverse, diverse)
    text = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert text == report.to_dict()
    assert text["model"] == "net"
    figure = report.plot()
    figure.canvas.draw()
    distances, classes, confidence = figure.axes
    assert distances.get_yscale() == "log"
    drawn = [line.get_ydata().tolist() for line in distances.lines]
    assert drawn == [list(report.images.distances.values())] * 2
    assert tuple(classes.patches[0].get_data().values) == report.images.class_counts
    assert sum(confidence.patches[0].get_data().values) == pytest.approx(1)


def test_one_image_and_one_class(teacher, diverse):
    report = examine_images(teacher, ImageSet(diverse.images[:1], diverse.labels[:1]))
    assert report.images.missing == 4
    assert report.to_dict()["images"]["nearest_distance"] is None
    assert any("Make at least 5 images" in w for w in report.warnings)
    report.plot().canvas.draw()
    chosen = diverse.labels == diverse.labels.mode().values
    facts = examine_images(teacher, ImageSet(diverse.images[chosen], diverse.labels[chosen])).images
    assert facts.balance == 0
    assert facts.within_class_distance > facts.nearest_distance > 0


def test_a_network_without_batch_norms(diverse):
    net = Net(lambda n, x: n.c(x).relu(), c=conv())
    teacher = Teacher(network_of(net), ModelInfo("plain", SHAPE))
    report = examine_images(teacher, diverse)
    assert report.images.distances == {}
    assert report.images.nearest_distance > 0
    report.plot().canvas.draw()


class TwoHeads(nn.Module):
    """Logits that are a sum, so that no single layer computes them."""

    def __init__(self):
        super().__init__()
        self.c, self.a, self.b = conv(), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        x = self.c(x).mean((2, 3))
        return self.a(x) + self.b(x.relu())


class ConvHead(nn.Module):
    """A convolution classifies each position."""

    def __init__(self):
        super().__init__()
        self.c, self.last = conv(), conv(4, 5)

    def forward(self, x):
        return self.last(self.c(x)).mean((2, 3))


class TokenHead(nn.Module):
    """A linear layer classifies each position, channels last."""

    def __init__(self):
        super().__init__()
        self.c, self.last = conv(), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.c(x).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("kind", [TwoHeads, ConvHead, TokenHead])
def test_features_of_other_classifiers(kind, diverse):
    torch.manual_seed(0)
    module = kind()
    with torch.no_grad():
        pooled = module.c(diverse.images).mean((2, 3))
        expected = module(diverse.images) if kind is TwoHeads else pooled
    similarity = functional.cosine_similarity(expected[:, None], expected[None], dim=2)
    nearest = 1 - similarity.fill_diagonal_(-1).max(1).values
    facts = examine_images(teacher_of(module), diverse).images
    assert facts.nearest_distance == pytest.approx(float(nearest.quantile(0.5)), abs=1e-5)


def test_a_batch_norm_that_is_called_twice_has_two_distances(diverse):
    net = Net(lambda n, x: n.b(n.b(n.c(x)) + 1), c=conv(), b=nn.BatchNorm2d(4))
    facts = examine_images(Teacher(network_of(net), ModelInfo("n", SHAPE)), diverse).images
    assert list(facts.distances) == ["b", "b_2"]
    assert facts.distances["b"] != facts.distances["b_2"]


def test_unsuitable_sets_are_refused(teacher, diverse):
    images, labels = diverse.images, diverse.labels
    for bad, message in (
        (ImageSet(images[:0], labels[:0]), "empty"),
        (ImageSet(images[:, :1], labels), "shape"),
        (ImageSet(images, labels[:9]), "150 images"),
        (ImageSet(images, labels + 1), "labels from 1 to 5"),
    ):
        with pytest.raises(UsageError, match=message):
            examine_images(teacher, bad)
        with pytest.raises(UsageError, match=message):
            examine_images(teacher, diverse, bad)
