# SPDX-License-Identifier: Apache-2.0
"""The running average of a student: less noise than its last step has.

Where weights sit near a rounding threshold every step flips some of their integers, so a student of
few bits is never still at a rate that lets it learn. The average of the float parameters over the
last steps, rounded once, is (Polyak and Juditsky, doi 10.1137/0330046; with exponential weights in
most current training code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class RunningAverage:
    """Exponentially weighted average of parameters that someone else moves.

    Args:
        parameters: what is learned.
        decay: 0 to 1; 0 averages nothing.

    Example:
        >>> weight = torch.tensor([0.0])
        >>> average = RunningAverage([weight], 0.5)
        >>> for step in range(3):
        ...     weight += 1
        ...     average.update(step)
        >>> average.settle()
        >>> weight
        tensor([2.7045])
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step ``step``, counted from 0.

        The decay is at most ``(step + 1) / (step + 10)``: the average reaches back over about a ninth
        of the steps so far.
        """
        if self.decay == 0:
            return
        if not self.values:
            self.values = [parameter.detach().clone() for parameter in self.parameters]
        decay = min(self.decay, (step + 1) / (step + 10))
        current = [parameter.detach() for parameter in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the parameters the average's values."""
        if self.values:
            torch._foreach_copy_(self.parameters, self.values)

    def state(self) -> dict[str, Tensor]:
        """Return the average by the index of its parameter; empty before the first step."""
        return {str(i): value for i, value in enumerate(self.values)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        found = enumerate(self.parameters) if state else ()
        self.values = [state[str(i)].to(parameter.device) for i, parameter in found]
