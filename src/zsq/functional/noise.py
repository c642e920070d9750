# SPDX-License-Identifier: Apache-2.0
"""Noise that pixels start from: white, or with the spectrum that photographs have.

A network does not see all of an image, and what it does not see stays as the optimiser found it. White noise
leaves a fine grain that no photograph has, and images that are all equally bright.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Size of a channel's own noise beside what all channels have in common: channels of photographs are
#: correlated by about 0.9, these by 1 / (1 + 0.4**2) = 0.86.
OWN = 0.4
#: What the constant part of an image counts as, in periods per image; it has no frequency of its own.
CONSTANT = 0.7


def start_noise(
    shape: tuple[int, ...], slope: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw images of noise with mean 0 and standard deviation 1.

    Args:
        shape: (N, C, ...), any number of axes of positions; without one noise is white.
        slope: amplitudes fall as ``frequency**-slope``. 0 is white noise, every value by itself; from there on
            channels are correlated, too. Photographs have about 1 (Field 1987, J. Opt. Soc. Am. A 4(12)), small
            pictures that were scaled down from them more.
        generator: to draw from, on the CPU.

    Returns:
        float32 of that shape. White noise is as `torch.randn` draws it; of other noise every channel
        has standard deviation 1 over the batch exactly.

    Example:
        >>> start_noise((2, 3, 8, 8), 1.4, torch.Generator().manual_seed(0)).std((0, 2, 3))
        tensor([1., 1., 1.])
    """
    if slope == 0 or len(shape) < 3:
        return torch.randn(shape, generator=generator)
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    own = torch.randn(shape, generator=generator)
    axes = tuple(range(2, len(shape)))
    spectrum = torch.fft.fftn(common + OWN * own, dim=axes) / _frequencies(shape[2:]) ** slope
    noise: Tensor = torch.fft.ifftn(spectrum, dim=axes).real
    return noise / noise.std((0, *axes), keepdim=True)


def _frequencies(sides: tuple[int, ...]) -> Tensor:
    """Return the length of each wave vector, in periods per longest side, of shape ``sides``."""
    axes = [torch.fft.fftfreq(side) * max(sides) for side in sides]
    waves = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    length = waves.square().sum(0).sqrt()
    return torch.where(length == 0, CONSTANT, length)
