# SPDX-License-Identifier: Apache-2.0
"""A picture of a set of images: one row per class."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zsq.errors import UsageError
from zsq.runtime.files import atomic_write
from zsq.synthesis.images import ImageSet

#: Pixels between two images, and the value of whatever no image covers.
GAP, BACKGROUND = 1, 255


def image_grid(
    images: ImageSet, *, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, per_class: int = 8, classes: int = 10,
) -> Tensor:  # fmt: skip
    """Lay images out in a grid: a row per class, in the order of the classes.

    Args:
        images: (N, C, H, W). One channel is grey, three are red, green and blue; of more the first
            three are shown, of two the first.
        mean: of the normalisation, per channel, for pixels in [0, 1].
        std: of the normalisation. Without mean and std the grid's smallest value is shown black and
            its largest white.
        per_class: images of a class, at most.
        classes: rows, at most: the first classes that occur.

    Returns:
        uint8, (rows * (H + 1) - 1, columns * (W + 1) - 1, 3); there are as many columns as the
        largest row needs.

    Raises:
        UsageError: no images, a count below 1, or a mean or std that does not fit the channels.

    Example:
        >>> shown = ImageSet(torch.zeros(4, 1, 2, 2), torch.tensor([3, 3, 3, 5]))
        >>> image_grid(shown).shape
        torch.Size([5, 8, 3])
    """
    if len(images) == 0 or per_class < 1 or classes < 1:
        raise UsageError(
            f"a grid of {len(images)} images with per_class={per_class} and classes={classes} "
            "would be empty; each must be at least 1."
        )
    rows = [
        torch.nonzero(images.labels == label).flatten()[:per_class]
        for label in sorted(set(images.labels.tolist()))[:classes]
    ]
    pixels = _to_bytes(images.images[torch.cat(rows)], mean, std)
    _, height, width, _ = pixels.shape
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    grid = torch.full(shape, BACKGROUND, dtype=torch.uint8)
    tiles = iter(pixels)
    for i, row in enumerate(rows):
        top = i * (height + GAP)
        for j in range(len(row)):
            left = j * (width + GAP)
            grid[top : top + height, left : left + width] = next(tiles)
    return grid


def save_grid(
    images: ImageSet, path: Path | str, *, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, per_class: int = 8, classes: int = 10,
) -> None:  # fmt: skip
    """Write `image_grid` as a PNG file; the arguments are the same.

    Raises:
        UsageError: see `image_grid`.
        RunError: the file cannot be written.
    """
    grid = image_grid(images, mean=mean, std=std, per_class=per_class, classes=classes)
    with atomic_write(path) as temporary:
        Image.fromarray(grid.numpy()).save(temporary, format="PNG")


def _to_bytes(
    images: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Tensor:
    """Map normalised images (N, C, H, W) to uint8 (N, H, W, 3); NaN and Inf become black."""
    channels = images.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise UsageError(
                f"{name} has {len(values)} values but the images have {channels} channels; give "
                "one value each."
            )
    pixels = images.float()
    finite = torch.isfinite(pixels)
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
        pixels = pixels * scale + shift
    elif bool(finite.any()):
        low, high = pixels[finite].min(), pixels[finite].max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    shown = torch.where(finite, pixels, 0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    shown = shown[:, :3] if channels >= 3 else shown[:, :1].expand(-1, 3, -1, -1)
    return shown.permute(0, 2, 3, 1)
