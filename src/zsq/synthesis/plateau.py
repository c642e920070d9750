# SPDX-License-Identifier: Apache-2.0
"""A learning rate that falls when the loss stops falling."""

from __future__ import annotations

import torch
from torch import Tensor


class Plateau:
    """Divide a learning rate by ten when the loss stops falling, without reading the device.

    The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau` with a relative threshold of 1e-4,
    applied after every step, on tensors.

    Args:
        rate: the learning rate, a scalar tensor that is changed in place.
        patience: steps without a better loss that are tolerated.
        floor: the smallest rate.
    """

    def __init__(self, rate: Tensor, patience: int, floor: float = 1e-4) -> None:
        self.rate, self.patience, self.floor = rate, patience, floor
        self.best = torch.full_like(rate, torch.inf)
        self.waited = torch.zeros_like(rate)

    def step(self, loss: Tensor) -> None:
        """Take note of a loss."""
        better = loss < self.best * (1 - 1e-4)
        self.best = torch.where(better, loss, self.best)
        self.waited = torch.where(better, 0.0, self.waited + 1)
        late = self.waited > self.patience
        self.rate.copy_(torch.where(late, (self.rate * 0.1).clamp(min=self.floor), self.rate))
        self.waited = torch.where(late, 0.0, self.waited)
