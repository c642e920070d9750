# SPDX-License-Identifier: Apache-2.0
"""Noise that pixels start from, against its spectrum as measured wave by wave."""

import math

import pytest
import torch

from zsq.functional.noise import OWN, start_noise


def drawn(shape, slope, seed=0):
    return start_noise(shape, slope, torch.Generator().manual_seed(seed))


def amplitude(images, down, right):
    """Root mean square of a wave's amplitude, by its cosine and sine, as a sum over pixels."""
    height, width = images.shape[2:]
    y = torch.arange(height).double()[:, None] / height
    x = torch.arange(width).double()[None] / width
    phase = 2 * math.pi * (down * y + right * x)
    cosine = (images.double() * phase.cos()).sum((2, 3))
    sine = (images.double() * phase.sin()).sum((2, 3))
    return float((cosine**2 + sine**2).mean().sqrt())


def test_without_a_slope_it_is_what_torch_draws():
    expected = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn((4, 3, 8, 8), 0.0), expected)


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.4])
def test_amplitudes_fall_as_frequencies_to_the_slope(slope):
    images = drawn((2000, 1, 16, 16), slope)
    first = amplitude(images, 1, 0)
    for down, right in [(0, 1), (2, 0), (0, 4), (3, 4), (7, 0), (6, -5)]:
        expected = first * math.hypot(down, right) ** -slope
        assert amplitude(images, down, right) == pytest.approx(expected, rel=0.08)


def test_waves_of_a_long_picture_count_by_their_length_not_by_their_number():
    images = drawn((2000, 1, 8, 32), 1.0)
    # 2 periods over 8 rows and 8 over 32 columns are both 4 pixels long
    assert amplitude(images, 2, 0) == pytest.approx(amplitude(images, 0, 8), rel=0.08)


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (64, 1, 7, 12), (64, 4, 16), (2, 3, 1, 1)])
def test_channels_have_the_spread_of_data(shape):
    images = drawn(shape, 1.4)
    assert images.shape == shape
    assert images.dtype == torch.float32
    axes = (0, *range(2, len(shape)))
    assert torch.allclose(images.std(axes), torch.ones(shape[1]), atol=1e-4)


def test_channels_have_most_of_it_in_common():
    flat = drawn((500, 3, 16, 16), 1.0).transpose(0, 1).flatten(1)
    expected = 1 / (1 + OWN**2)
    off = torch.corrcoef(flat)[[0, 0, 1], [1, 2, 2]]
    assert off.tolist() == pytest.approx([expected] * 3, abs=0.04)


def test_pictures_differ_in_brightness_as_white_noise_does_not():
    def share(images):
        return float(images.mean((2, 3)).var(0).mean())

    assert share(drawn((500, 3, 32, 32), 0.0)) < 0.005
    assert 0.1 < share(drawn((500, 3, 32, 32), 1.4)) < 0.4


def test_the_seed_decides():
    assert torch.equal(drawn((2, 3, 8, 8), 1.0, 5), drawn((2, 3, 8, 8), 1.0, 5))
    assert not torch.equal(drawn((2, 3, 8, 8), 1.0, 5), drawn((2, 3, 8, 8), 1.0, 6))


def test_values_without_places_are_white():
    assert torch.equal(drawn((4, 10), 1.0), drawn((4, 10), 0.0))
