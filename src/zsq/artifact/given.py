# SPDX-License-Identifier: Apache-2.0
"""Images that a run is given instead of making its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from zsq.artifact.runfolder import RunFolder
from zsq.errors import UsageError
from zsq.runtime.group import Group
from zsq.synthesis.images import Images, ImageSet

#: Where images of other runs are: one place, or several, whose images are put together.
Places = str | Path | Sequence[str | Path] | None


def given_images(images: Images, images_from: Places) -> Images:
    """Return the images to use, those of another run among them.

    Args:
        images: given ones, a folder of real ones, or None.
        images_from: the folder of a run, or its ``images.safetensors``; several are put together.

    Raises:
        UsageError: both, or no readable images there, or images of different shapes.
    """
    places = [images_from] if isinstance(images_from, str | Path) else list(images_from or ())
    if not places:
        return images
    if images is not None:
        raise UsageError(
            "--images (real images) and --images-from (those of another run) exclude each other; "
            "leave one out."
        )
    return ImageSet.joined([_images_of(Path(place)) for place in places])


def _images_of(path: Path) -> ImageSet:
    return ImageSet.load(
        path if path.is_file() else RunFolder.open(path).require("images.safetensors")
    )


def known_to_all(group: Group, images: Images, images_from: Places) -> Images:
    """Return `given_images` on process 0 of a group, which alone needs them, and their name on others.

    Raises:
        UsageError: as `given_images`.
    """
    if group.size == 1:
        return given_images(images, images_from)
    mine = given_images(images, images_from) if group.rank == 0 else None
    name = group.from_first(lambda: None if mine is None else name_of(mine))
    return mine if group.rank == 0 else name


def name_of(images: Images) -> str:
    """Name images so that others, or the same with other labels, have another name."""
    if images is None or isinstance(images, (str, Path)):
        return "synthetic" if images is None else str(images)
    parts = [images] if isinstance(images, Tensor) else [images.images, images.labels.long()]
    digest = hashlib.sha256()
    for part in parts:
        values = part.detach().float() if part.is_floating_point() else part
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return f"given {digest.hexdigest()[:16]}"
