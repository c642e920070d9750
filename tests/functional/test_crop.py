# SPDX-License-Identifier: Apache-2.0
"""Random crops as matrix products, against torch's interpolation."""

import torch
from torch.nn import functional

from zsq.functional.crop import ASPECTS, crop, random_windows


def test_a_window_of_whole_pixels_is_torchs_bilinear_resize():
    images = torch.randn(2, 3, 8, 12)
    windows = torch.tensor([[2 / 8, 3 / 12, 4 / 8, 6 / 12, 0.0], [1 / 8, 0, 7 / 8, 5 / 12, 1.0]])
    found = crop(images, windows)
    first = functional.interpolate(images[:1, :, 2:6, 3:9], (8, 12), mode="bilinear")
    second = functional.interpolate(images[1:, :, 1:8, 0:5], (8, 12), mode="bilinear").flip(3)
    assert torch.allclose(found[:1], first, atol=1e-5)
    assert torch.allclose(found[1:], second, atol=1e-5)


def test_whole_windows_change_nothing():
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(crop(images, random_windows(4, 0.5, 0.0)), images)


def test_windows_have_the_areas_and_aspects_asked_for():
    windows = random_windows(4000, 0.4, 1.0, torch.Generator().manual_seed(0))
    top, left, height, width, mirrored = windows.unbind(1)
    assert bool((top >= 0).all())
    assert bool((left >= 0).all())
    assert bool((top + height <= 1 + 1e-6).all())
    assert bool((left + width <= 1 + 1e-6).all())
    area, aspect = height * width, width / height
    assert 0.4 <= area.min() < 0.42
    assert area.max() > 0.95
    assert 0.6 < area.mean() < 0.75
    assert ASPECTS[0] - 1e-5 <= aspect.min() < 0.8
    assert 1.25 < aspect.max() <= ASPECTS[1] + 1e-5
    assert 0.46 < mirrored.mean() < 0.54


def test_gradients_reach_the_pixels_inside_the_window_only():
    images = torch.zeros(1, 1, 8, 8, requires_grad=True)
    crop(images, torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]])).sum().backward()
    assert bool((images.grad[..., :4, :4] > 0).all())
    assert images.grad[..., 4:, :].abs().sum() == 0
    assert images.grad[..., :, 4:].abs().sum() == 0
