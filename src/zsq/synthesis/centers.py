# SPDX-License-Identifier: Apache-2.0
"""Class centres in feature space, from the images made so far (IntraQ, arXiv 2111.09136)."""

from __future__ import annotations

import torch
from torch import Tensor


class ClassCenters:
    """Running means of features per class.

    Args:
        classes: how many.
        width: of a feature vector.

    Example:
        >>> centers = ClassCenters(2, 1)
        >>> centers.add(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]))
        >>> centers.of(torch.tensor([1, 0]))
        (tensor([[2.],
                [0.]]), tensor([ True, False]))
    """

    def __init__(self, classes: int, width: int) -> None:
        self.total = torch.zeros(classes, width)
        self.count = torch.zeros(classes)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take note of finished images: features (N, width), labels (N,), on the CPU."""
        self.total.index_add_(0, labels, features)
        self.count.index_add_(0, labels, torch.ones(len(labels)))

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each label's centre, (N, width), and whether it has one, (N,) bool."""
        means = self.total / self.count.clamp(min=1)[:, None]
        return means[labels], self.count[labels] > 0
