# SPDX-License-Identifier: Apache-2.0
"""Grids of images: which image is where, and which bytes its pixels become."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from zsq.analysis.images import image_grid, save_grid
from zsq.errors import RunError, UsageError
from zsq.synthesis.images import ImageSet

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def bytes_as_images(count, channels=3, height=4, width=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, height, width), generator=generator)


def normalised(pixels):
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


def test_each_image_is_in_its_place_with_its_pixels():
    pixels = bytes_as_images(6)
    shown = ImageSet(normalised(pixels), torch.tensor([7, 2, 7, 2, 7, 9]))
    grid = image_grid(shown, mean=MEAN, std=STD, per_class=2, classes=2)
    assert (grid.shape, grid.dtype) == ((9, 11, 3), torch.uint8)
    for index, top, left in ((1, 0, 0), (3, 0, 6), (0, 5, 0), (2, 5, 6)):
        tile = grid[top : top + 4, left : left + 5]
        assert torch.equal(tile.int(), pixels[index].permute(1, 2, 0).int())
    assert bool((grid[4] == 255).all())
    assert bool((grid[:, 5] == 255).all())


def test_short_rows_are_filled_up():
    grid = image_grid(ImageSet(torch.zeros(3, 1, 2, 2), torch.tensor([0, 0, 1])))
    assert grid.shape == (5, 5, 3)
    assert bool((grid[3:, 3:] == 255).all())
    assert bool((grid[3:, :2] == 0).all())


def test_without_normalisation_the_grid_is_stretched():
    images = torch.tensor([-3.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    grid = image_grid(ImageSet(images, torch.tensor([0])))
    assert grid[:, :, 0].tolist() == [[0, 153], [204, 255]]
    assert torch.equal(grid[..., 0], grid[..., 2])


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_any_number_of_channels(channels, shown):
    pixels = bytes_as_images(1, channels)
    pixels[0, 0, 0, :2] = torch.tensor([0, 255])
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    grid = image_grid(ImageSet(pixels / 255, torch.tensor([0])), mean=zeros, std=ones)
    assert torch.equal(grid.permute(2, 0, 1).int(), pixels[0, shown].int())


def test_broken_pixels_are_black():
    images = torch.tensor([math.nan, math.inf, 1.0, 3.0]).reshape(1, 1, 2, 2)
    grid = image_grid(ImageSet(images, torch.tensor([0])))
    assert grid[:, :, 0].tolist() == [[0, 0], [0, 255]]
    assert int(image_grid(ImageSet(images * math.nan, torch.tensor([0]))).sum()) == 0


def test_the_file_holds_the_grid(tmp_path):
    shown = ImageSet(normalised(bytes_as_images(4)), torch.tensor([0, 0, 1, 2]))
    save_grid(shown, tmp_path / "grid.png", mean=MEAN, std=STD, per_class=1, classes=2)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG"
        read = np.array(image)
    expected = image_grid(shown, mean=MEAN, std=STD, per_class=1, classes=2)
    assert np.array_equal(read, expected.numpy())
    with pytest.raises(RunError, match="cannot write"):
        save_grid(shown, tmp_path / "absent" / "grid.png")


def test_empty_grids_and_other_channels_are_refused():
    shown = ImageSet(torch.zeros(2, 3, 2, 2), torch.zeros(2).long())
    for bad, options in ((ImageSet(shown.images[:0], shown.labels[:0]), {}),
                         (shown, {"per_class": 0}), (shown, {"classes": 0})):  # fmt: skip
        with pytest.raises(UsageError, match="empty"):
            image_grid(bad, **options)
    with pytest.raises(UsageError, match=r"mean has 1 .* 3 channels"):
        image_grid(shown, mean=(0.5,), std=(1.0,))
