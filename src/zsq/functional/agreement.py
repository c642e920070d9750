# SPDX-License-Identifier: Apache-2.0
"""Do two losses pull the same way? Cosines between their gradients (AIT, arXiv 2203.17008, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

#: Key of the cosine over all parameters together.
OVERALL = "overall"


def gradient_cosines(
    losses: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Return the cosine between the gradients of every two losses, per parameter and overall.

    Args:
        losses: scalars of one graph, by name.
        parameters: what is differentiated, by name; their ``grad`` is left alone.

    Returns:
        ``{"a,b": {"overall": cosine, name: cosine, ...}}``; 0 where a gradient vanishes.

    Example:
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> gradient_cosines({"a": w.sum(), "b": w[0] - w[1]}, {"w": w})
        {'a,b': {'overall': 0.0, 'w': 0.0}}
    """
    gradients = {
        name: torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        for name, loss in losses.items()
    }
    found = {}
    for first, second in combinations(losses, 2):
        both = zip(gradients[first], gradients[second], strict=True)
        # products of small numbers are 0 in float32
        pairs = [(a.double(), b.double()) for a, b in both]
        dots = torch.stack([(a * b).sum() for a, b in pairs])
        squares = torch.stack([torch.stack([a.square().sum(), b.square().sum()]) for a, b in pairs])
        dots = torch.cat([dots.sum()[None], dots])
        squares = torch.cat([squares.sum(0)[None], squares])
        cosines = dots / squares.sqrt().prod(1).clamp(min=torch.finfo(dots.dtype).tiny)
        names = [OVERALL, *parameters]
        found[f"{first},{second}"] = dict(zip(names, cosines.tolist(), strict=True))
    return found
