# SPDX-License-Identifier: Apache-2.0
"""AutoReCon's generators: an architecture, built (arXiv 2105.12151).

The noise is split in three; each part is mapped to 64 channels at one of three resolutions and
joins there. Three cells double the resolution from an eighth of the image to the image; the class
enters through conditional batch norms on every edge, nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from zsq.synthesis.architecture import Architecture, Cell
from zsq.synthesis.conditional import RELEASED_EPS, ConditionalBatchNorm
from zsq.synthesis.generator import BatchStandardize, upsample_twice
from zsq.synthesis.labels import Labels

#: Lengths of the three parts of the noise.
LATENT = (33, 33, 34)


class Edge(nn.Module):
    """One operation of a cell: conditional batch norm, LeakyReLU(0.2), convolution.

    Args:
        choice: one of `zsq.synthesis.architecture.OPERATIONS` or `CROSSES`, but not ``0``.
        up: double the resolution first; ``choice`` then names the interpolation.
        classes: of the teacher.
        channels: of input and output.
    """

    def __init__(self, choice: str, *, up: bool, classes: int, channels: int) -> None:
        super().__init__()
        self.up = choice if up else ""
        self.skip = choice == "s"
        if self.skip:
            return
        size = 1 if up else int(choice[1])
        dilation = 2 if choice[0] == "d" else 1
        self.norm = ConditionalBatchNorm(classes, channels, RELEASED_EPS)
        self.conv = nn.Conv2d(
            channels, channels, size, padding=dilation * (size // 2), dilation=dilation
        )

    def forward(self, x: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Apply the edge to ``x`` (N, channels, H, W)."""
        if self.skip:
            return x
        if self.up == "N":
            x = upsample_twice(x)
        elif self.up:
            x = interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        y: Tensor = self.conv(leaky_relu(self.norm(x, classes, weights), 0.2))
        return y


class CellNetwork(nn.Module):
    """One cell; edges that are ``0`` are not built.

    Args:
        cell: the choices.
        classes: of the teacher.
        channels: of every node.
    """

    def __init__(self, cell: Cell, classes: int, channels: int) -> None:
        super().__init__()

        def build(choices: Sequence[str], up: bool) -> nn.ModuleDict:
            return nn.ModuleDict({
                str(i): Edge(choice, up=up, classes=classes, channels=channels)
                for i, choice in enumerate(choices)
                if choice != "0"
            })  # fmt: skip

        self.ups = build(cell.ups, True)
        self.operations = build(cell.operations, False)
        self.crosses = build(cell.crosses, True)

    def forward(
        self, x: Tensor, before: Sequence[Tensor | None], classes: Tensor, weights: Tensor
    ) -> list[Tensor | None]:
        """Return the nodes ``n0 .. n3``; ``before`` are those of the cell before."""
        nodes: list[Tensor | None] = [self.ups[str(i)](x, classes, weights) for i in range(2)]
        for first_operation, sources, first_cross in ((0, 2, 0), (2, 3, 3)):
            arriving = [
                self.operations[str(first_operation + i)](nodes[i], classes, weights)
                for i in range(sources)
                if str(first_operation + i) in self.operations and nodes[i] is not None
            ] + [
                self.crosses[str(first_cross + i)](node, classes, weights)
                for i, node in enumerate(before[:3])
                if str(first_cross + i) in self.crosses and node is not None
            ]
            nodes.append(torch.stack(arriving).sum(0) if len(arriving) > 1 else
                         arriving[0] if arriving else None)  # fmt: skip
        return nodes


class AutoReconGenerator(nn.Module):
    """Noise and a class to images, by a searched architecture.

    Args:
        architecture: published, or from `zsq.synthesis.search`.
        classes: of the teacher.
        image_shape: (C, H, W); sides that are not multiples of eight are cropped.
        channels: of every node; 64 as published.

    Example:
        >>> from zsq.synthesis.architecture import published_architectures
        >>> from zsq.synthesis.labels import plain_labels
        >>> found = published_architectures()["resnet20_cifar10"]
        >>> generator = AutoReconGenerator(found, 10, (3, 32, 32))
        >>> labels = plain_labels(2, 10, torch.device("cpu"))
        >>> generator(generator.draw_noise(labels), labels.classes, labels.weights).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, architecture: Architecture, classes: int, image_shape: tuple[int, ...],
        channels: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_shape, self.channels = image_shape, channels
        self.base = tuple((side + 7) // 8 for side in image_shape[1:])
        area = self.base[0] * self.base[1]
        self.projections = nn.ModuleList(
            nn.Linear(length, channels * area * 4**i) for i, length in enumerate(LATENT)
        )
        self.cells = nn.ModuleList(self._cell(c, classes, channels) for c in architecture.cells)
        self.norm = ConditionalBatchNorm(classes, channels, RELEASED_EPS)
        self.conv = nn.Conv2d(channels, image_shape[0], 3, padding=1)
        self.standardize = BatchStandardize(image_shape[0], affine=False)

    def _cell(self, cell: Cell, classes: int, channels: int) -> nn.Module:
        return CellNetwork(cell, classes, channels)

    def draw_noise(self, labels: Labels) -> Tensor:
        """Return standard normal noise, (N, 100)."""
        return torch.randn(len(labels.classes), sum(LATENT), device=labels.classes.device)

    def forward(self, noise: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Return images (N, C, H, W), float32, in the teacher's normalised space.

        Args:
            noise: (N, 100).
            classes: (N, K) int64.
            weights: (N, K) float32, rows that sum to 1.
        """
        nodes: Sequence[Tensor | None] = ()
        for i, part in enumerate(torch.split(noise, list(LATENT), dim=1)):
            height, width = (side * 2**i for side in self.base)
            x = self.projections[i](part).reshape(-1, self.channels, height, width)
            if nodes:
                x = x + nodes[3]
            nodes = self.cells[i](x, nodes, classes, weights)
        y = self.conv(leaky_relu(self.norm(nodes[3], classes, weights), 0.2))
        y = torch.tanh(y)[:, :, : self.image_shape[1], : self.image_shape[2]]
        images: Tensor = self.standardize(y.float())
        return images
