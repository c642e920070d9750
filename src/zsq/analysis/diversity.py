# SPDX-License-Identifier: Apache-2.0
"""How much the images of a set differ, by their features and by their pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: Images whose similarities to all others are in memory at a time.
ROWS = 128


def nearest_distances(features: Tensor) -> Tensor:
    """Return each row's cosine distance to the row most like it.

    Args:
        features: (N, F).

    Returns:
        (N,), each between 0 and 2; empty for fewer than two rows.

    Example:
        >>> nearest_distances(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])).tolist()
        [1.0, 0.0, 0.0]
    """
    if len(features) < 2:
        return features.new_zeros(0)
    unit = normalize(features.float(), dim=1)
    found = []
    for start in range(0, len(unit), ROWS):
        similarity = unit[start : start + ROWS] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -math.inf
        found.append(1 - similarity.max(1).values)
    return torch.cat(found).clamp(min=0)


def within_class_distance(features: Tensor, labels: Tensor) -> float:
    """Return the mean cosine distance between two images of one class, over all such pairs.

    Args:
        features: (N, F).
        labels: (N,) int64.

    Returns:
        Between 0 and 2; NaN where no class has two images.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
        >>> within_class_distance(features, torch.tensor([4, 4, 7]))
        1.0
    """
    unit = normalize(features.double(), dim=1)
    distance, pairs = 0.0, 0
    for label in set(labels.tolist()):
        rows = unit[labels == label]
        # The sum over ordered pairs of a dot product is |sum|^2 less the rows' own.
        similarity = float(rows.sum(0).square().sum() - rows.square().sum())
        count = len(rows) * (len(rows) - 1)
        distance += count - similarity
        pairs += count
    return max(distance / pairs, 0.0) if pairs else math.nan


def pixel_spread(images: Tensor) -> float:
    """Return which share of the pixels' variance is between images rather than within each.

    Args:
        images: (N, C, H, W).

    Returns:
        0 for copies of one image, 1 for independent noise; NaN for a single image.

    Example:
        >>> pixel_spread(torch.randn(1, 3, 4, 4).expand(8, -1, -1, -1))
        0.0
    """
    if len(images) < 2:
        return math.nan
    between = float(images.float().var(0, correction=0).mean())
    return between / max(float(images.float().var(correction=0)), 1e-30)
