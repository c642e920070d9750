# SPDX-License-Identifier: Apache-2.0
"""From an image file to the tensor a network expects."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsq.errors import UsageError

# By channels of the network's input.
_MODES = {1: "L", 3: "RGB"}
#: A picture's short side is resized to at most so many times the crop: beyond, all of the memory is soon too little.
MOST_OF_CROP = 16
# Pillow's modes for more than 8 bits, which its conversion to 8 bits would cut off.
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class Preprocessing:
    """How images become input. `checked` makes one from facts that may be missing.

    Attributes:
        input_shape: channels (1 or 3), height, width.
        mean: subtracted from each channel, pixels in [0, 1].
        std: each channel is divided by it afterwards.
        resize: pixels of the short side before the centre crop; None: images have the input size.
        interpolation: of that resize: nearest, bilinear, bicubic, ... (Pillow's names).
    """

    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

    @classmethod
    def checked(
        cls,
        input_shape: tuple[int, ...] | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        resize: int | None = None,
        interpolation: str = "bilinear",
    ) -> Preprocessing:
        """Return the preprocessing.

        Raises:
            UsageError: a fact is missing or they do not fit together; names the option to give.
        """
        if input_shape is None:
            raise UsageError(
                "the input size is not known: give --input-shape CHANNELS,HEIGHT,WIDTH."
            )
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise UsageError(
                f"the input shape {','.join(map(str, input_shape))} is not that of an image: give --input-shape "
                "CHANNELS,HEIGHT,WIDTH."
            )
        channels, height, width = input_shape
        if channels not in _MODES:
            raise UsageError(
                f"the network takes {channels} channels, and images have 1 or 3: evaluate it from "
                "Python on your own batches."
            )
        if mean is None or std is None:
            raise UsageError(
                "the normalisation of the images is not known: give --mean and --std, one number "
                "a channel, for pixels in [0, 1]."
            )
        finite = all(map(math.isfinite, (*mean, *std)))
        if len(mean) != channels or len(std) != channels or not finite or min(std) <= 0:
            raise UsageError(
                f"--mean {_join(mean)} and --std {_join(std)} do not fit {channels} channels: give "
                "one finite number a channel, --std above 0."
            )
        if resize is not None and resize < max(height, width):
            raise UsageError(
                f"--resize {resize} is smaller than the crop of {height}x{width}: give at least "
                f"{max(height, width)}."
            )
        if resize is not None and resize > MOST_OF_CROP * max(height, width):
            raise UsageError(
                f"--resize {resize} leaves next to nothing of a picture in a crop of {height}x{width}: give at most "
                f"{MOST_OF_CROP * max(height, width)}."
            )
        if interpolation.upper() not in Image.Resampling.__members__:
            raise UsageError(
                f"interpolation {interpolation!r} is unknown: it is one of "
                f"{', '.join(name.lower() for name in Image.Resampling.__members__)}."
            )
        return cls(input_shape, tuple(mean), tuple(std), resize, interpolation)

    def decode(self, path: Path) -> Tensor:
        """Read one image: uint8 ``[channels, height, width]``, resized and cropped.

        Raises:
            UsageError: the file is no readable image, or has another size and there is no resize.
        """
        if path.exists() and not path.is_file():  # a pipe would be waited for, for good
            raise UsageError(f"{path} is no file, though it has an image's name; take it away.")
        try:
            with Image.open(path) as image:
                image.load()
                if image.mode.startswith(_DEEP_MODES):
                    raise UsageError(
                        f"{path} has more than 8 bits a channel ({image.mode}): convert it to 8."
                    )
                fitted = self._fit(image.convert(_MODES[self.input_shape[0]]), path)
                pixels = torch.from_numpy(np.array(fitted))
        except UsageError:
            raise
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as e:
            raise UsageError(
                f"{path} cannot be read as an image ({e}): replace or remove the file."
            ) from e
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Map bytes ``[N, C, H, W]`` to float32 in units of ``std`` around ``mean``."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std)
        )
        return (pixels.float() / 255).sub_(mean).div_(std).contiguous()

    def _fit(self, image: Image.Image, path: Path) -> Image.Image:
        _, height, width = self.input_shape
        if self.resize is None:
            if image.size != (width, height):
                raise UsageError(
                    f"{path} is {image.height}x{image.width} and the network takes {height}x"
                    f"{width}: resize the images, or give --resize N (pixels of the short side "
                    "before the centre crop)."
                )
            return image
        short = min(image.size)
        # The long side is cut to whole pixels and the crop rounded, as torchvision does.
        size = [int(self.resize * side / short) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _join(values: tuple[float, ...]) -> str:
    return ",".join(str(value) for value in values)
