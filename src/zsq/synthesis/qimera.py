# SPDX-License-Identifier: Apache-2.0
"""Qimera's generator: images between classes, from mixtures of class embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import embedding_bag, layer_norm

from zsq.errors import UsageError
from zsq.synthesis.conditional import RELEASED_EPS, Trunk
from zsq.synthesis.labels import Labels
from zsq.teacher.fold import module_of
from zsq.teacher.layers import Layer
from zsq.teacher.taps import classifier_node


class QimeraGenerator(nn.Module):
    """Mixtures of noisy class embeddings to images (Qimera, arXiv 2111.02625).

    Each of an image's K classes gives a slot: its embedding plus noise, normalised. The weighted
    sum of the slots (the superposed embedding) makes the image. K = 1 is the plain path.

    Args:
        classes: number of classes.
        image_shape: (C, H, W), any sides.
        embedding: where the label embedding starts, (classes, latent), e.g. `classifier_rows` of
            the teacher (extracted embedding initialisation); None: standard normal numbers.
        latent: length D of embedding and noise.
        conditional: classes enter through conditional batch norms too (the ImageNet form).
        disentangle: width of the linear map on the embedding (disentanglement mapping; 100 in the
            paper's setting); None: no map, as the released scripts run.
        noise_scale: standard deviation of the noise that is added to an embedding.
        per_sample_norm: normalise each slot of each sample over its D coordinates. False: as
            released, where mixtures are normalised per slot over batch and coordinates.
        rescale_rows: scale each row of ``embedding`` to unit standard deviation, that of the noise;
            a classifier's rows are several times smaller and their class would drown.
        divide_by_mixed: as released, see `zsq.synthesis.conditional.ConditionalBatchNorm`.
        eps: of the inner batch norms; the published 0.8 unless told.

    Raises:
        UsageError: ``embedding`` is not of shape (classes, latent).
    """

    def __init__(
        self, classes: int, image_shape: tuple[int, ...], embedding: Tensor | None = None,
        latent: int = 64, *, conditional: bool = False, disentangle: int | None = None,
        noise_scale: float = 1.0, per_sample_norm: bool = True, rescale_rows: bool = False,
        divide_by_mixed: bool = False, eps: float = RELEASED_EPS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise_scale = noise_scale
        self.per_sample_norm = per_sample_norm
        rows = _first_rows(embedding, classes, latent, rescale_rows)
        self.embedding = nn.Parameter(rows)
        self.disentangle = None if disentangle is None else nn.Linear(latent, disentangle)
        self.trunk = Trunk(
            disentangle or latent, image_shape, classes if conditional else None, eps=eps,
            divide_by_mixed=divide_by_mixed,
        )  # fmt: skip

    def draw_noise(self, labels: Labels) -> Tensor:
        """Return standard normal noise, one vector per slot: (N, K, latent)."""
        latent = self.embedding.shape[1]
        return torch.randn(*labels.classes.shape, latent, device=labels.classes.device)

    def forward(self, noise: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Return images (N, C, H, W), float32, in the teacher's normalised space.

        Args:
            noise: (N, K, latent).
            classes: (N, K) int64.
            weights: (N, K) float32, rows that sum to 1.
        """
        # Bags of one row: a lookup whose gradient is summed in a fixed order (see `mixed_rows`).
        rows = embedding_bag(classes.reshape(-1, 1), self.embedding, mode="sum")
        slots = self._normalise(rows.reshape(noise.shape) + self.noise_scale * noise)
        vectors = (weights[:, :, None] * slots).sum(1)
        if self.disentangle is not None:
            # The map is affine and weights sum to 1: after mixing it gives the same, K times cheaper.
            vectors = self.disentangle(vectors)
        images: Tensor = self.trunk(vectors, classes, weights)
        return images

    def _normalise(self, slots: Tensor) -> Tensor:
        if self.per_sample_norm or slots.shape[1] == 1:
            return layer_norm(slots, slots.shape[2:], eps=1e-5)
        variance, mean = torch.var_mean(slots, (0, 2), correction=0, keepdim=True)
        return (slots - mean) * torch.rsqrt(variance + 1e-5)


def _first_rows(embedding: Tensor | None, classes: int, latent: int, rescale: bool) -> Tensor:
    """Return the label embedding to start from, a tensor of its own."""
    if embedding is None:
        return torch.randn(classes, latent)
    if embedding.shape != (classes, latent):
        raise UsageError(
            f"the label embedding would start at rows of shape {tuple(embedding.shape)}; it must "
            f"be {(classes, latent)}, as classes and latent say. Set latent to the width of the "
            "teacher's classifier, or start the embedding at random."
        )
    rows = embedding.detach().to("cpu", torch.float32).clone()
    if rescale:
        std = rows.std(1, correction=0, keepdim=True)
        rows /= torch.where(std > 0, std, 1.0)
    return rows


def classifier_rows(network: GraphModule) -> Tensor:
    """Return the weight of the layer that computes a network's logits, (classes, D) float32.

    Raises:
        UsageError: the logits are not one layer's outputs.
    """
    layer = module_of(network, classifier_node(network))
    assert isinstance(layer, Layer)
    return layer.weight.detach().float().flatten(1).clone()
