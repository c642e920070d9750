# SPDX-License-Identifier: Apache-2.0
"""Labelled images in the common layout: one folder a class, in it the images."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.evaluation.preprocessing import Preprocessing
from zsq.runtime.machine import usable_cores
from zsq.teacher.teacher import ModelInfo

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_WORKERS = min(8, usable_cores())
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ImageFolder:
    """Files, their labels, and how to read them; nothing is decoded yet.

    Attributes:
        root: the folder of class folders.
        classes: names of the class folders, sorted; the class index is the position.
        files: all images.
        labels: class index of each file.
        preprocessing: how files become input.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode all images in order, in threads, a little ahead of the reader.

        Args:
            batch_size: images in each batch; the last one may have fewer.

        Yields:
            Normalised images, float32 ``[n, channels, height, width]``, and int64 labels ``[n]``.

        Raises:
            UsageError: a file is corrupt or of the wrong size; names it.
        """
        return _read(self, range(len(self.files)), batch_size)


def open_for(info: ModelInfo, root: Path | str) -> ImageFolder:
    """List images to be read as a network wants them.

    Args:
        info: input shape, normalisation, resize and its filter.
        root: as for `open_folder`, whose errors it raises.
    """
    return open_folder(
        root, input_shape=info.input_shape, mean=info.mean, std=info.std, resize=info.resize,
        interpolation=info.interpolation,
    )  # fmt: skip


def open_folder(
    root: Path | str,
    *,
    input_shape: tuple[int, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    resize: int | None = None,
    interpolation: str = "bilinear",
) -> ImageFolder:
    """List the images of ``root/<class>/...``, at any depth below the class folder.

    Folders and files whose name starts with a dot are passed over.

    Args:
        root: the folder of class folders.
        input_shape: channels, height, width of the network's input.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, for pixels in [0, 1].
        resize: pixels of the short side before the centre crop; None: no resize.
        interpolation: of that resize, by Pillow's name.

    Raises:
        UsageError: there is no such folder, no class folder or no image; or the facts about the
            input are missing or wrong.
    """
    preprocessing = Preprocessing.checked(input_shape, mean, std, resize, interpolation)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder: give one that holds a folder for each class.")
    folders = sorted(
        (p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda folder: folder.name,
    )
    if not folders:
        raise UsageError(
            f"{root} holds no class folders: put the images of each class into a folder of its own."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = _images_below(folder)
        files += images
        labels += [label] * len(images)
    if not files:
        raise UsageError(f"{root} holds no images in its class folders ({', '.join(SUFFIXES)}).")
    classes = tuple(folder.name for folder in folders)
    return ImageFolder(root, classes, tuple(files), tuple(labels), preprocessing)


def load_images(folder: ImageFolder, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Read a random subset with as many images of each class as possible, for few-shot runs.

    Args:
        folder: where from.
        count: how many images in all; classes differ by one at most while they have enough.
        seed: the same seed gives the same images in the same order.

    Returns:
        Normalised images, float32 ``[count, channels, height, width]``, and int64 labels.

    Raises:
        UsageError: ``count`` is not in 1 to the number of images, or a file cannot be read.
    """
    if not 1 <= count <= len(folder):
        raise UsageError(f"{count} images asked for: {folder.root} has 1 to {len(folder)} to give.")
    chosen = _balanced(folder.labels, count, random.Random(seed))
    images, labels = zip(*_read(folder, chosen, batch_size=256), strict=True)
    return torch.cat(images), torch.cat(labels)


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _leads_back(parent, name)
        )
        found += [
            Path(parent, name)
            for name in sorted(names)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return found


def _leads_back(parent: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, whose images would be counted again and again."""
    there, here = Path(parent, name).resolve(), Path(parent).resolve()
    return there == here or there in here.parents


def _balanced(labels: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Take one image of each class in turn, classes and images in random order."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    queues = list(members.values())
    for queue in queues:
        rng.shuffle(queue)
    chosen: list[int] = []
    while len(chosen) < count:
        rng.shuffle(queues)
        chosen += [queue.pop() for queue in queues[: count - len(chosen)]]
        queues = [queue for queue in queues if queue]
    rng.shuffle(chosen)
    return chosen


def _read(
    folder: ImageFolder, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} must be at least 1.")
    decode, normalise = folder.preprocessing.decode, folder.preprocessing.normalise
    waiting: deque[tuple[list[Future[Tensor]], Tensor]] = deque()
    starts = deque(range(0, len(indices), batch_size))
    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            while starts or waiting:
                while starts and len(waiting) < _BATCHES_AHEAD:
                    start = starts.popleft()
                    batch = indices[start : start + batch_size]
                    futures = [pool.submit(decode, folder.files[index]) for index in batch]
                    waiting.append((futures, torch.tensor([folder.labels[i] for i in batch])))
                futures, labels = waiting.popleft()
                yield normalise(torch.stack([future.result() for future in futures])), labels
        finally:
            # An error, or a reader who stops early, needs none of what is left.
            pool.shutdown(wait=False, cancel_futures=True)
