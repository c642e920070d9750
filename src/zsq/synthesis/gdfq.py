# SPDX-License-Identifier: Apache-2.0
"""GDFQ's generator (Generative Low-bitwidth Data Free Quantization, ECCV 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsq.synthesis.conditional import RELEASED_EPS, Trunk, mixed_rows
from zsq.synthesis.labels import Labels


class GdfqGenerator(nn.Module):
    """Noise and a class to images (GDFQ, arXiv 2003.03603).

    The label enters either as an embedding that multiplies the noise (the CIFAR form) or through
    conditional batch norms alone (the ImageNet form).

    Args:
        classes: number of classes.
        image_shape: (C, H, W), any sides.
        latent: length of the noise.
        conditional: the ImageNet form.
        eps: of the inner batch norms; the published 0.8 unless told.

    Example:
        >>> from zsq.synthesis.labels import plain_labels
        >>> generator = GdfqGenerator(10, (3, 32, 32))
        >>> labels = plain_labels(2, 10, torch.device("cpu"))
        >>> generator(generator.draw_noise(labels), labels.classes, labels.weights).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, classes: int, image_shape: tuple[int, ...], latent: int = 100, *,
        conditional: bool = False, eps: float = RELEASED_EPS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent = latent
        self.embedding = None if conditional else nn.Parameter(torch.randn(classes, latent))
        self.trunk = Trunk(latent, image_shape, classes if conditional else None, eps=eps)

    def draw_noise(self, labels: Labels) -> Tensor:
        """Return standard normal noise, (N, latent)."""
        return torch.randn(len(labels.classes), self.latent, device=labels.classes.device)

    def forward(self, noise: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Return images (N, C, H, W), float32, in the teacher's normalised space.

        Args:
            noise: (N, latent).
            classes: (N, K) int64; GDFQ itself asks for K = 1.
            weights: (N, K) float32, rows that sum to 1.
        """
        if self.embedding is not None:
            noise = noise * mixed_rows(self.embedding, classes, weights)
        images: Tensor = self.trunk(noise, classes, weights)
        return images
