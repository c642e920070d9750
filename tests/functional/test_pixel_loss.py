# SPDX-License-Identifier: Apache-2.0
"""The terms that pixels are optimised for, against loops over images, layers and channels."""

import math

import pytest
import torch
from torch.nn import functional

from zsq.functional.generator_loss import variance_distance
from zsq.functional.pixel_loss import (
    batch_statistics_distance,
    class_band,
    difficulty_cross_entropy,
    image_statistics_distance,
    soft_target_error,
)


def layers(groups=1, count=4):
    """Inputs of two batch norms, their stored means and variances."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 6, 6), (5, 3, 3)]
    inputs = [2 * torch.randn(groups * count, *s, generator=generator) + 0.5 for s in shapes]
    means = [torch.randn(s[0], generator=generator) for s in shapes]
    variances = [torch.rand(s[0], generator=generator) + 0.5 for s in shapes]
    return inputs, means, variances


def test_zeroq_is_the_published_sum_over_layers_and_channels():
    """Image by image with torch's own std; the image is layer 0, with mean 0 and std 1."""
    inputs, means, variances = layers()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for n in range(4):
        for layer, mean, variance in zip(
            [images, *inputs], [torch.zeros(3), *means], [torch.ones(3) - 1e-6, *variances], strict=True
        ):  # fmt: skip
            for c in range(len(mean)):
                pixels = layer[n, c].double()
                expected += (float(pixels.mean()) - float(mean[c])) ** 2 / 4
                std = math.sqrt(float(pixels.var()) + 1e-6)
                expected += (std - math.sqrt(float(variance[c]) + 1e-6)) ** 2 / 4
    found = image_statistics_distance(images, inputs, means, variances, 1)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_values_that_images_have_one_of_are_spread_over_a_batch():
    """Behind pooling an image cannot have a deviation; else all images would be asked to be alike."""
    generator = torch.Generator().manual_seed(2)
    vectors = 2 * torch.randn(3 * 8, 5, generator=generator) + 0.5
    mean, variance = torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5
    images = torch.zeros(3 * 8, 3, 4, 4)
    without = image_statistics_distance(images, [], [], [], 3)
    for x in (vectors, vectors[:, :, None, None]):
        found = image_statistics_distance(images, [x], [mean], [variance], 3) - without
        for group, part in enumerate(vectors.double().split(8)):
            gap = part.mean(0) - mean
            spread = (part.var(0) + 1e-6).sqrt() - (variance.double() + 1e-6).sqrt()
            assert found[group].item() == pytest.approx((gap**2 + spread**2).sum().item(), rel=1e-4)


def test_vectors_as_images_are_spread_over_their_batch_too():
    generator = torch.Generator().manual_seed(3)
    vectors = 2 * torch.randn(2 * 8, 3, 1, 1, generator=generator) + 0.5
    found = image_statistics_distance(vectors, [], [], [], 2)
    for group, part in enumerate(vectors.double().flatten(1).split(8)):
        expected = (part.mean(0) ** 2 + ((part.var(0) + 1e-6).sqrt() - 1) ** 2).sum()
        assert found[group].item() == pytest.approx(expected.item(), rel=1e-4)


def test_batch_statistics_are_those_of_each_batch_alone():
    inputs, means, variances = layers(groups=3)
    together = batch_statistics_distance(inputs, means, variances, 3)
    for group in range(3):
        part = [x[group * 4 : group * 4 + 4] for x in inputs]
        alone = variance_distance(part, means, variances)
        assert together[group].item() == pytest.approx(alone.item(), rel=1e-5)


def test_batch_statistics_vanish_on_the_batch_they_are_of():
    inputs, _, _ = layers()
    means = [x.mean((0, 2, 3)) for x in inputs]
    variances = [x.var((0, 2, 3), correction=0) for x in inputs]
    assert batch_statistics_distance(inputs, means, variances, 1).item() < 1e-10
    images = torch.randn(4, 3, 8, 8)
    assert image_statistics_distance(images, inputs, means, variances, 1).item() > 0.1


def test_hard_samples_with_gamma_zero_is_plain_cross_entropy():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    found = difficulty_cross_entropy(logits, labels, 0.0)
    assert found.item() == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_hard_samples_weigh_by_difficulty(gamma):
    logits, labels = torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 3, 4, 0])
    p = logits.softmax(1)[torch.arange(6), labels]
    expected = ((1 - p) ** gamma * -p.log()).reshape(2, 3).mean(1)
    found = difficulty_cross_entropy(logits, labels, gamma, groups=2)
    assert torch.allclose(found.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("margin", [5.0, 17.0, 30.0, 200.0])
def test_certain_images_have_finite_gradients(margin):
    """The published form has gradient infinity times zero where p rounds to 1."""
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    difficulty_cross_entropy(logits, torch.tensor([0]), 0.5).sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    naive = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    p = naive.softmax(1)[0, 0]
    ((1 - p) ** 0.5 * -p.log()).backward()
    assert bool(torch.isfinite(naive.grad).all()) == (margin < 17)


def test_soft_targets_of_one_are_reached_by_certainty():
    logits, labels = torch.tensor([[40.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    assert soft_target_error(logits, labels, torch.ones(2), 2).tolist() == [0.0, 0.25]


def test_the_widest_band_is_no_constraint():
    features, centers = torch.randn(8, 6), torch.randn(8, 6)
    assert class_band(features, centers, torch.ones(8) > 0, (0.0, 2.0)).item() == 0.0


def test_the_band_bounds_the_distance_from_both_sides():
    centers = torch.tensor([[1.0, 0.0]] * 4)
    features = torch.tensor(
        [[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]
    )  # distances 0 1 2 .29
    known = torch.tensor([True, True, True, True])
    found = class_band(features, centers, known, (0.05, 0.8), groups=2)
    assert torch.allclose(found, torch.tensor([(0.05 + 0.2) / 2, 1.2 / 2]), atol=1e-6)
    known = torch.tensor([False, True, False, False])
    found = class_band(features, centers, known, (0.05, 0.8), groups=2)
    assert torch.allclose(found, torch.tensor([0.2, 0.0]), atol=1e-6)
