# SPDX-License-Identifier: Apache-2.0
"""Watching which integers ever move while a student learns."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq.quantizers.minmax import MinMaxWeight


class IntegerWatch:
    """Notes which integer weights have been seen to differ from where they started.

    Args:
        weights: by layer path, before the first step.
    """

    def __init__(self, weights: dict[str, MinMaxWeight]) -> None:
        self.weights = weights
        self.start = self.codes()
        self.moved = {
            path: torch.zeros_like(codes, dtype=torch.bool) for path, codes in self.start.items()
        }

    def codes(self) -> dict[str, Tensor]:
        """Return the integers of each layer as they are, by path."""
        return {path: weight.codes() for path, weight in self.weights.items()}

    @torch.no_grad()
    def changed_since(self, before: dict[str, Tensor]) -> dict[str, float]:
        """Return the share of each layer's integers that differ from what `codes` returned.

        They differ where a weight crossed a threshold, and where a step moved the smallest or the
        largest weight of a channel, and with it the channel's grid.
        """
        if not before:
            return {}
        shares = torch.stack([
            (weight.codes() != before[path]).float().mean() for path, weight in self.weights.items()
        ])  # fmt: skip
        return dict(zip(self.weights, shares.tolist(), strict=True))

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Compare with the start; return the share of each layer's integers that ever moved."""
        if not self.weights:
            return {}
        for path, weight in self.weights.items():
            self.moved[path] |= weight.codes() != self.start[path]
        shares = torch.stack([moved.float().mean() for moved in self.moved.values()])
        return dict(zip(self.moved, shares.tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Return what has been seen so far."""
        return dict(self.moved)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for path, moved in self.moved.items():
            moved.copy_(state[path])
