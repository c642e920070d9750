# SPDX-License-Identifier: Apache-2.0
"""Labels that a conditional generator is asked for: one class an image, or a mixture of several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """What each image of a batch should show.

    Attributes:
        classes: (N, K) int64; K = 1 for plain labels. A class may occur twice in a row.
        weights: (N, K) float32; every row sums to 1.
    """

    classes: Tensor
    weights: Tensor

    def soft(self, count: int) -> Tensor:
        """Return the target distribution over ``count`` classes, (N, count) float32.

        Example:
            >>> Labels(torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]])).soft(3)
            tensor([[0.2500, 0.0000, 0.7500]])
        """
        target = torch.zeros(len(self.classes), count, device=self.weights.device)
        return target.scatter_add_(1, self.classes, self.weights)


def plain_labels(count: int, classes: int, device: torch.device) -> Labels:
    """Draw ``count`` classes uniformly, with replacement."""
    drawn = torch.randint(classes, (count, 1), device=device)
    return Labels(drawn, torch.ones(count, 1, device=device))


def superposed_labels(count: int, classes: int, mixed: int, device: torch.device) -> Labels:
    """Draw mixtures of ``mixed`` classes (superposed embeddings; Qimera, arXiv 2111.02625).

    Classes are uniform with replacement; weights are the softmax of standard normal numbers.
    """
    drawn = torch.randint(classes, (count, mixed), device=device)
    return Labels(drawn, torch.randn(count, mixed, device=device).softmax(1))
