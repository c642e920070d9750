# SPDX-License-Identifier: Apache-2.0
"""GENIE's generator: from latent vectors to images in the teacher's normalised input space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Turns mean and variance of a part of a batch into those of the whole.
Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel of ``x`` (N, C, H, W), each (C,) float32.

    Written as sums per image so that a compiler runs them in parallel over images and fuses them
    with their neighbours.
    """
    wide = x.float()
    count = x.numel() // x.shape[1]
    mean = wide.sum((2, 3)).sum(0) / count
    variance = (wide * wide).sum((2, 3)).sum(0) / count - mean * mean
    return mean, variance.clamp(min=0.0)


class BatchNormalizer(nn.Module):
    """A module that normalises with its batch's moments.

    Attributes:
        pool: where the batch is a part of one that several processes share, makes its moments those
            of the whole; see `whole_batches`.
    """

    pool: Pool | None = None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance per channel of the batch ``x`` belongs to."""
        mean, variance = batch_moments(x)
        if self.pool is None:
            return mean, variance
        mean, variance = self.pool(mean, variance)
        return mean, variance.clamp(min=0.0)


@contextmanager
def whole_batches(network: nn.Module, pool: Pool | None) -> Iterator[None]:
    """Let a generator's norms pool their moments inside the block; None leaves them alone."""
    norms = [m for m in network.modules() if isinstance(m, BatchNormalizer)] if pool else []
    for norm in norms:
        norm.pool = pool
    try:
        yield
    finally:
        for norm in norms:
            norm.pool = None


class BatchStandardize(BatchNormalizer):
    """Batch norm that always uses the batch's own statistics, in float32.

    The same arithmetic as `torch.nn.BatchNorm2d` in training mode; see `batch_moments`.

    Args:
        channels: C.
        affine: learn a scale and a shift per channel.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.eps = eps

    def reset_parameters(self) -> None:
        """Return to scale 1 and shift 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``x`` (N, C, H, W)."""
        mean, variance = self.moments(x)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x.float() * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)).to(x.dtype)


def upsample_twice(x: Tensor) -> Tensor:
    """Repeat every pixel of ``x`` (N, C, H, W) to 2 x 2 (nearest neighbour)."""
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None, :]
    return rows.expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class Generator(nn.Module):
    """Latent vectors to images (GENIE, arXiv 2212.04780, section 4.1).

    A linear map to 128 channels at a quarter of the side, two nearest up-samplings with 3x3
    convolutions, tanh, and a batch norm without parameters: the images of a batch have mean 0 and
    standard deviation 1 per channel by construction.

    Args:
        latent: length of a latent vector.
        image_shape: (C, H, W); sides that are not multiples of four are cropped.
    """

    def __init__(self, latent: int, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = image_shape
        self.base = ((height + 3) // 4, (width + 3) // 4)
        self.project = nn.Linear(latent, 128 * self.base[0] * self.base[1])
        self.norm1 = BatchStandardize(128)
        self.conv1 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2 = BatchStandardize(64)
        self.conv2 = nn.Conv2d(64, channels, 3, padding=1)
        self.norm3 = BatchStandardize(channels, affine=False)

    def reset_parameters(self) -> None:
        """Start afresh: every synthesis batch trains a generator of its own."""
        for module in (self.project, self.norm1, self.conv1, self.norm2, self.conv2):
            module.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """Return images (N, C, H, W), float32, for latents ``z`` (N, latent)."""
        x = self.project(z).reshape(-1, *self.base, 128).permute(0, 3, 1, 2)
        x = upsample_twice(self.norm1(x))
        x = torch.nn.functional.leaky_relu(self.norm2(self.conv1(x)), 0.2)
        x = torch.tanh(self.conv2(upsample_twice(x)))
        x = x[:, :, : self.image_shape[1], : self.image_shape[2]]
        images: Tensor = self.norm3(x.float())
        return images
