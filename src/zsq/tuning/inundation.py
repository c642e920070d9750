# SPDX-License-Identifier: Apache-2.0
"""Gradient inundation: scale each layer's step until enough of its integer weights change.

AIT (arXiv 2203.17008) trains a student on the divergence from its teacher alone: on synthetic images
the gradients of cross-entropy and divergence point apart, and the latter has the flatter surface.
Its gradients are small and uneven, though. A master weight that moves without reaching a rounding
threshold changes nothing in the quantized network, and under the divergence alone hardly any weight
ever does. Inundation therefore multiplies the whole step of a weight tensor, momentum included, by
the smallest ``a >= 1`` at which a share ``target`` of the tensor's integers changes. The momentum
keeps raw gradients; ``a`` is decided anew in every step and for every tensor; no step is shrunk.

The published procedure searches ``a`` by doubling and bisection on a grid that moves with the
weights, reading the device at every trial (``grid="moving"``). On the grid before the step there is
a closed form (`zsq.functional.crossing`), which needs one pass and guarantees the share
(``grid="frozen"``, the default) on that grid. What a step does to the smallest or largest weight
of a channel moves the channel's grid as well, and so may change more codes of the next one, or fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from zsq.functional.affine import quant_max, quantize
from zsq.functional.crossing import crossing_multipliers, multiplier_for_share
from zsq.quantizers.minmax import MinMaxWeight, minmax_grid

Crossings = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""weight, direction, scale, zero point and bits -> the multiplier at which each code changes"""

#: Bisections after the doubling, as published.
BISECTIONS = 5


class InundatedSGD:
    """SGD with Nesterov momentum over quantized weights, each tensor's step scaled by inundation.

    With a target of 0 it is `torch.optim.SGD`.

    Args:
        weights: quantizers by the path of their layer.
        momentum: 0 to 1; Nesterov's where positive.
        weight_decay: added to the gradient, in search and step alike.
        grid: ``frozen`` counts changed codes on the grid before the step, ``moving`` on the grid of
            the moved weights.
        guarantee: with a moving grid, end on the side of the bracket that reaches the target
            (published code ends wherever its last trial was).
        crossings: `crossing_multipliers`, or the same compiled.

    Attributes:
        names: paths in the order of `shares` and `multipliers`.
        shares: share of each tensor's codes that the last measured step changed, on the grid of
            `grid`, (L,).
        multipliers: of the last measured step, (L,).
    """

    def __init__(
        self, weights: Mapping[str, MinMaxWeight], *, momentum: float = 0.9,
        weight_decay: float = 0.0, grid: Literal["frozen", "moving"] = "frozen",
        guarantee: bool = True, crossings: Crossings = crossing_multipliers,
    ) -> None:  # fmt: skip
        self.names = list(weights)
        self.crossings = crossings
        self.momentum, self.weight_decay = momentum, weight_decay
        self.grid, self.guarantee = grid, guarantee
        self._weights = list(weights.values())
        self.buffers = [torch.zeros_like(w.master) for w in self._weights]
        self._groups = _equal_shapes(self._weights)
        grouped = torch.tensor([i for group in self._groups for i in group])
        self._order = grouped.argsort().to(self.buffers[0].device)
        self.shares = torch.zeros(len(self.names))
        self.multipliers = torch.ones(len(self.names))

    def zero_grad(self) -> None:
        """Forget gradients."""
        for weight in self._weights:
            weight.master.grad = None

    @torch.no_grad()
    def step(
        self, lr: float, target: float = 0.0, cap: float = 65536.0, *, measure: bool = True
    ) -> None:
        """Move every weight against its gradient.

        Args:
            lr: learning rate. As long as a step of this rate changes less than the target, it is
                the target that sets the speed.
            target: share of each tensor's integers to change; 0 switches inundation off.
            cap: largest multiplier.
            measure: note `shares` and `multipliers`; a pass over the weights that only records need.
        """
        directions = self._directions(lr)
        if target > 0 or measure:
            self._inundate(directions, target, cap, measure)
        torch._foreach_sub_([w.master for w in self._weights], directions)

    def _directions(self, lr: float) -> list[Tensor]:
        """Return ``lr * (gradient + momentum * buffer)`` per tensor; buffers take the gradients in."""
        gradients = [_gradient(w.master) for w in self._weights]
        if self.weight_decay:
            masters: list[Tensor] = [w.master for w in self._weights]
            gradients = list(torch._foreach_add(gradients, masters, alpha=self.weight_decay))
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, gradients)
        directions = list(torch._foreach_add(gradients, self.buffers, alpha=self.momentum))
        torch._foreach_mul_(directions, lr)
        return directions

    def _inundate(self, directions: list[Tensor], target: float, cap: float, measure: bool) -> None:
        """Multiply each direction in place; note multipliers and, if measured, shares."""
        decide = self._frozen if self.grid == "frozen" else self._moving
        shares, multipliers = [], []
        for group in self._groups:
            found, changed = decide(group, [directions[i] for i in group], target, cap, measure)
            multipliers.append(found)
            shares.append(changed)
        self.multipliers = torch.cat(multipliers)[self._order]
        if measure:
            self.shares = torch.cat(shares)[self._order]
        if target > 0:
            torch._foreach_mul_(directions, list(self.multipliers.unbind()))

    def _frozen(
        self, group: list[int], directions: list[Tensor], target: float, cap: float, measure: bool
    ) -> tuple[Tensor, Tensor]:
        """Return multipliers and shares of tensors of one shape, as (L,) each."""
        members = [self._weights[i] for i in group]
        # channels of all tensors follow each other; one tensor alone is not copied
        weight = _joined([_rows(w.master, w.master) for w in members])
        direction = _joined([_rows(d, w.master) for d, w in zip(directions, members, strict=True)])
        if members[0].given is None:  # one pass over all channels, where each weight's own would do
            scale, zero_point = minmax_grid(weight, members[0].bits)
        else:
            scale, zero_point = torch.cat([torch.stack(w.grid()) for w in members], dim=1)
        crossings = self.crossings(weight, direction, scale, zero_point, members[0].bits)
        crossings = crossings.reshape(len(group), -1)
        found = crossings.new_ones(len(group))
        if target > 0:
            found = multiplier_for_share(crossings, target, cap)
        if not measure:
            return found, torch.zeros_like(found)
        return found, (crossings <= found.unsqueeze(1)).float().mean(1)

    def _moving(
        self, group: list[int], directions: list[Tensor], target: float, cap: float, measure: bool
    ) -> tuple[Tensor, Tensor]:
        found, changed = [], []
        for i, direction in zip(group, directions, strict=True):
            share = _share_on_moving_grid(self._weights[i], direction)
            still = not bool(direction.isfinite().all()) or not bool(direction.any())
            a = 1.0 if still or target <= 0 else search_multiplier(
                share, target, cap, guarantee=self.guarantee
            )  # fmt: skip
            found.append(a)
            changed.append(0.0 if still or not measure else share(a))
        device = directions[0].device
        return torch.tensor(found, device=device), torch.tensor(changed, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the momentum buffers by layer."""
        return dict(zip(self.names, self.buffers, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for name, buffer in zip(self.names, self.buffers, strict=True):
            buffer.copy_(state[name])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _equal_shapes(weights: list[MinMaxWeight]) -> list[list[int]]:
    """Group the indices of tensors of equal shape and bits, so that each group is one operation."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((tuple(weight.master.shape), weight.bits), []).append(i)
    return list(groups.values())


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` (C, ...) as (C, K), elements in the memory order of ``like``: nothing is copied."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _share_on_moving_grid(weight: MinMaxWeight, direction: Tensor) -> Callable[[float], float]:
    """Return the function ``a -> share of codes that differ after the step``, grid recomputed."""
    before = weight.codes()

    def share(a: float) -> float:
        moved = weight.master - a * direction
        after = quantize(moved, *weight.grid_of(moved), quant_max(weight.bits))
        return float((after != before).float().mean())

    return share


def search_multiplier(
    share: Callable[[float], float], target: float, cap: float, *, guarantee: bool = False
) -> float:
    """Search a multiplier by doubling and bisection, as AIT's public code does.

    Args:
        share: share of codes that a multiplier changes.
        target: the share wanted.
        cap: doubling ends here; no result is larger.
        guarantee: return the side of the bracket that reaches the target, not the last trial.

    Returns:
        1 where a plain step reaches the target; else a multiplier near, not always beyond, it.
    """
    if share(1.0) >= target:
        return 1.0
    high = min(2.0, cap)
    while share(high) < target and high < cap:
        high = min(2 * high, cap)
    low = middle = max(high / 2, 1.0)  # no step is shrunk
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        reached = share(middle)
        if abs(reached - target) < target / 100 and not (guarantee and reached < target):
            return middle
        if reached < target:
            low = middle
        else:
            high = middle
    return high if guarantee else middle
