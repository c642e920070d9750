# SPDX-License-Identifier: Apache-2.0
"""What the conditional generators of GDFQ and Qimera share: class tables and the convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, leaky_relu

from zsq.synthesis.generator import BatchNormalizer, BatchStandardize, upsample_twice

#: Eps of the generators' inner batch norms, as published. The layer's second positional argument is
#: eps; 0.8 was passed there by a widely copied example that meant it as the momentum. It damps
#: channels of small variance, and every published number was obtained with it.
RELEASED_EPS = 0.8


def mixed_rows(table: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of rows that each sample asks for, (N, D).

    An embedding bag rather than indexing: its gradient is summed in a fixed order, compiled or not
    (that of indexing, compiled, differs from run to run), and (N, K, D) never exists.

    Args:
        table: (rows, D).
        classes: (N, K) int64.
        weights: (N, K), of the table's dtype; gets no gradient.

    Example:
        >>> table = torch.tensor([[0.0, 4.0], [2.0, 0.0]])
        >>> mixed_rows(table, torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]))
        tensor([[1.5000, 1.0000]])
    """
    return embedding_bag(classes, table, mode="sum", per_sample_weights=weights)


class ConditionalBatchNorm(BatchNormalizer):
    """Batch norm whose scale and shift are the sample's class's own.

    Normalised with the batch's statistics, always; then scaled and shifted per sample by a row of
    two tables that start at 1 and 0, so that a new generator does not see the class. A mixture of
    classes uses the mixture of their rows.

    Args:
        classes: rows of the tables.
        channels: C.
        eps: added to the variance.
        divide_by_mixed: divide the mixture of K rows by K, as Qimera's public code does; the signal
            shrinks K-fold in every such norm and images of mixtures are constant from K of about 10.
    """

    def __init__(
        self, classes: int, channels: int, eps: float = 1e-5, *, divide_by_mixed: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes, channels))
        self.eps = eps
        self.divide_by_mixed = divide_by_mixed

    def forward(self, x: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Normalise ``x`` (N, C, H, W), whose samples show mixtures of classes, each (N, K)."""
        if self.divide_by_mixed:
            weights = weights / classes.shape[1]
        mean, variance = self.moments(x)
        scale = mixed_rows(self.weight, classes, weights) * torch.rsqrt(variance + self.eps)
        shift = mixed_rows(self.bias, classes, weights) - mean * scale
        return (x.float() * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


class Trunk(nn.Module):
    """From one vector per image to images, as in GDFQ (arXiv 2003.03603) and Qimera.

    A linear map to 128 channels at a quarter of the side; two nearest up-samplings, each followed
    by a 3x3 convolution (to 128 and 64 channels), a batch norm and LeakyReLU(0.2); a 3x3
    convolution to the image's channels, tanh, and a batch norm without parameters: the images of a
    batch have mean 0 and standard deviation 1 per channel by construction.

    Args:
        width: length of the vectors.
        image_shape: (C, H, W); sides that are not multiples of four are cropped.
        classes: number of classes, for conditional batch norms; None: plain ones.
        eps: of the batch norms behind the first two convolutions.
        divide_by_mixed: see `ConditionalBatchNorm`.
    """

    def __init__(
        self, width: int, image_shape: tuple[int, ...], classes: int | None = None, *,
        eps: float = RELEASED_EPS, divide_by_mixed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        channels, height, side = image_shape
        self.image_shape = image_shape
        self.base = ((height + 3) // 4, (side + 3) // 4)

        def norm(channels: int, eps: float) -> nn.Module:
            if classes is None:
                return BatchStandardize(channels, eps=eps)
            return ConditionalBatchNorm(classes, channels, eps, divide_by_mixed=divide_by_mixed)

        self.project = nn.Linear(width, 128 * self.base[0] * self.base[1])
        self.norm1 = norm(128, 1e-5)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm2 = norm(128, eps)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm3 = norm(64, eps)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.norm4 = BatchStandardize(channels, affine=False)

    def forward(self, vectors: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Return images (N, C, H, W), float32, for ``vectors`` (N, width)."""

        def normalise(norm: nn.Module, x: Tensor) -> Tensor:
            given = (classes, weights) if isinstance(norm, ConditionalBatchNorm) else ()
            normalised: Tensor = norm(x, *given)
            return normalised

        x = self.project(vectors).reshape(-1, *self.base, 128).permute(0, 3, 1, 2)
        x = upsample_twice(normalise(self.norm1, x))
        x = upsample_twice(leaky_relu(normalise(self.norm2, self.conv1(x)), 0.2))
        x = leaky_relu(normalise(self.norm3, self.conv2(x)), 0.2)
        x = torch.tanh(self.conv3(x))
        x = x[:, :, : self.image_shape[1], : self.image_shape[2]]
        images: Tensor = self.norm4(x.float())
        return images
