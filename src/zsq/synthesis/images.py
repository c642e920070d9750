# SPDX-License-Identifier: Apache-2.0
"""A set of images to quantize with: synthetic or real, with labels and where they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.runtime.checkpoints import load_tensors, save_tensors
from zsq.runtime.context import Context
from zsq.runtime.group import Group
from zsq.teacher.teacher import Teacher


@dataclass(frozen=True)
class ImageSet:
    """Images in the teacher's normalised input space.

    Attributes:
        images: (N, C, H, W) float32.
        labels: (N,) int64; for synthetic images the classes they were made for, or the teacher's predictions
            where the method has none in mind.
        provenance: how they came about: method, settings, model, seed, losses.
    """

    images: Tensor
    labels: Tensor
    provenance: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_tensors(path, {"images": self.images, "labels": self.labels}, self.provenance)

    @classmethod
    def load(cls, path: Path) -> ImageSet:
        """Read what `save` wrote.

        Raises:
            UsageError: not such a file.
        """
        tensors, provenance = load_tensors(path)
        if set(tensors) != {"images", "labels"} or tensors["images"].ndim != 4:
            raise UsageError(f"{path} holds {sorted(tensors)}, not images and labels.")
        return cls(tensors["images"].float(), tensors["labels"].long(), provenance)

    @classmethod
    def shared(cls, group: Group, make: Callable[[], ImageSet]) -> ImageSet:
        """Return the set that ``make`` returns on process 0, where alone it is called."""
        if group.size == 1:
            return make()
        mine = make() if group.rank == 0 else None
        tensors = group.share({"images": mine.images, "labels": mine.labels} if mine else None)
        provenance = group.send(mine.provenance if mine else {}, 0)
        return cls(tensors["images"], tensors["labels"], provenance)

    @classmethod
    def joined(cls, sets: Sequence[ImageSet]) -> ImageSet:
        """Put sets together, evenly mixed: whoever takes the first images only takes some of every set.

        Args:
            sets: at least one; a single one is returned as it is.

        Returns:
            All images, those of each set in their order; the provenance lists the sets'.

        Raises:
            UsageError: images of different shapes.

        Example:
            >>> sets = [ImageSet(torch.full((n, 1, 1, 1), n), torch.full((n,), n)) for n in (2, 4)]
            >>> ImageSet.joined(sets).labels
            tensor([4, 2, 4, 4, 2, 4])
        """
        if len(sets) == 1:
            return sets[0]
        shapes = {tuple(part.images.shape[1:]) for part in sets}
        if len(shapes) != 1:
            raise UsageError(
                f"images of shapes {sorted(shapes)} cannot be put together; use sets made for one network."
            )
        places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in sets])
        order = places.argsort(stable=True)
        provenance: dict[str, object] = {
            "method": "mixed", "images": [len(part) for part in sets],
            "parts": [part.provenance for part in sets],
            "synthetic": all(part.provenance.get("synthetic", False) for part in sets),
        }  # fmt: skip
        return cls(
            torch.cat([part.images for part in sets])[order],
            torch.cat([part.labels for part in sets])[order],
            provenance,
        )

    def check(self, input_shape: tuple[int, ...]) -> ImageSet:
        """Return self if the images suit a network's input.

        Raises:
            UsageError: another shape, no images, labels missing, or NaN among the pixels.
        """
        if len(self) == 0:
            raise UsageError("the image set is empty; at least one image is needed.")
        if tuple(self.images.shape[1:]) != tuple(input_shape):
            raise UsageError(
                f"the images have shape {tuple(self.images.shape[1:])} but the network takes "
                f"{tuple(input_shape)}; use images made for this network."
            )
        if self.labels.shape != (len(self),):
            raise UsageError(
                f"there are {len(self)} images and labels of shape {tuple(self.labels.shape)}; every "
                "image needs one label."
            )
        if not self.images.is_floating_point():
            raise UsageError(
                f"the images are {self.images.dtype}, not the normalised floats that the network takes; for pixels "
                "from 0 to 255 pass (pixels / 255 - mean) / std."
            )
        if not bool(torch.isfinite(self.images).all()):
            raise UsageError("the images hold NaN or Inf.")
        return self

    def check_labels(self, classes: int) -> ImageSet:
        """Return self if every label is one of a network's classes; whoever learns from labels asks.

        Raises:
            UsageError: a label is not.
        """
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= classes:
            raise UsageError(
                f"the images have labels from {low} to {high} but the network has {classes} classes, 0 "
                f"to {classes - 1}; use images labelled for this network."
            )
        return self


@torch.no_grad()
def predict(teacher: Teacher, images: Tensor, context: Context) -> Tensor:
    """Return the teacher's classes for ``images``, (N,) int64 on the CPU."""
    network = context.policy.placed_copy(teacher.network)
    return torch.cat(
        [
            network(part.to(context.policy.device)).argmax(1).cpu()
            for part in torch.split(images, 128)
        ]
    )


def image_set(images: ImageSet | Tensor, teacher: Teacher, context: Context) -> ImageSet:
    """Return checked images; those of a tensor (N, C, H, W) have the teacher's predictions for labels.

    Raises:
        UsageError: the images do not suit the network, see `ImageSet.check`.
    """
    shape = teacher.info.input_shape
    if isinstance(images, ImageSet):
        kept = images.check(shape)
        return replace(kept, images=kept.images.detach().float(), labels=kept.labels.long())
    if not isinstance(images, Tensor):
        raise UsageError(
            f"images are an ImageSet or a normalised tensor (N, C, H, W), not a {type(images).__name__}."
        )
    if images.ndim != 4:
        raise UsageError(
            f"images are a normalised tensor (N, C, H, W), not one of shape {tuple(images.shape)}."
        )
    given = ImageSet(images, torch.zeros(len(images), dtype=torch.long), {"method": "given"})
    pixels = given.check(shape).images.detach().float()
    return replace(given, images=pixels, labels=predict(teacher, pixels, context))


#: What a run may be given as images: a set, normalised pixels (N, C, H, W), a folder of real ones, or none.
Images = ImageSet | Tensor | str | Path | None
