# SPDX-License-Identifier: Apache-2.0
"""Min-max quantizers: what fine-tuning learns through (protocol ``all-low-bit``).

Weights keep a float master whose grid spans each output channel's minimum and maximum and moves
with them, unless they start from a tuned weight and keep its grid; activations get the running range
of a warm-up, frozen afterwards. Gradients pass straight through both, also where a value was
clamped, as in GDFQ (arXiv 2003.03603) and its descendants, whose ranges clamp next to nothing. For
narrower ranges activations can stop them there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zsq.functional.affine import grid_of_range, per_channel, quant_max, quantize
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.weight import FrozenWeight

Rounding = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
"""x, scale, zero point, largest and smallest code -> x on the grid"""


#: How far from its integer, in steps, a master may lie that goes on from a tuned weight; 0.5 is the threshold.
REACH = 0.4


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, high: int, low: int) -> Tensor:
    """Return ``dequantize(quantize(x))``, computed in float32, in the precision of ``x``.

    In place after the first operation: memory is what this costs.
    """
    s, z = per_channel(scale, x), per_channel(zero_point, x)
    return (x.float() / s).round_().add_(z).clamp_(low, high).sub_(z).mul_(s).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Quantize and dequantize; the gradient passes as if nothing had happened, or not if clamped."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor, scale: Tensor, zero_point: Tensor, high: int, low: int, rounding: Rounding,
        stop: bool,
    ) -> Tensor:  # fmt: skip
        ctx.codes = (low, high) if stop else None  # type: ignore[attr-defined]
        if stop:
            ctx.save_for_backward(x, scale, zero_point)
        return rounding(x, scale, zero_point, high, low)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.codes is not None:  # type: ignore[attr-defined]
            x, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
            s, z = per_channel(scale, x), per_channel(zero_point, x)
            codes = (x.float() / s).round_().add_(z)
            inside = codes.clamp(*ctx.codes).eq_(codes)  # type: ignore[attr-defined]
            gradient = gradient * inside.to(gradient.dtype)
        return gradient, None, None, None, None, None, None


def straight_through(
    x: Tensor, scale: Tensor, zero_point: Tensor, high: int, low: int = 0,
    rounding: Rounding = to_grid, *, stop: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``x`` on a grid, with gradient 1 everywhere or wherever no code was clamped.

    Args:
        x: any shape, float32 or bfloat16.
        scale: scalar, or (C,) for one per index of axis 0; a constant in the backward pass.
        zero_point: like ``scale``.
        high: largest code.
        low: smallest code.
        rounding: `to_grid`, or the same compiled.
        stop: let no gradient pass where a code was clamped.

    Example:
        >>> x = torch.tensor([0.26, 9.0], requires_grad=True)
        >>> y = straight_through(x, torch.tensor(0.1), torch.tensor(0.0), 15)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([0.3000, 1.5000]), tensor([1., 1.]))
    """
    return _StraightThrough.apply(x, scale, zero_point, high, low, rounding, stop)  # type: ignore[no-any-return,no-untyped-call]


class MinMaxWeight(nn.Module):
    """A float master weight, rounded on its own per-channel min-max grid in every forward pass.

    The grid always contains zero, as integer runtimes need; the published one does without, which
    differs only for channels whose weights all have one sign.

    Args:
        weight: (C, ...) float; copied.
        bits: 2 to 8.

    Attributes:
        master: the learned weight.
        given: scale and zero point, (2, C), of a weight that was tuned before (`go_on_from`); None for the
            grid of the master's own minimum and maximum.
        held: the rounded weight that all passes share, while there is one
            (`zsq.tuning.promotion.rounded_once`).
    """

    given: Tensor | None
    held: Tensor | None

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.held = None
        self.bits = bits
        self.master = nn.Parameter(weight.detach().clone())
        self.register_buffer("given", None)

    @torch.no_grad()
    def go_on_from(self, tuned: FrozenWeight) -> None:
        """Begin with the integers of a tuned weight, on its grid, which stands still from then on.

        The master moves no further than to within `REACH` steps of its integer: those that were rounded
        against their value are the first to change when learning says so.

        Args:
            tuned: of the master's shape and bits.
        """
        self.given = torch.stack([tuned.scale, tuned.zero_point]).to(self.master.device)
        scale, zero_point = (per_channel(each, self.master) for each in self.given)
        codes = tuned.codes().to(self.master)
        position = (self.master / scale + zero_point).clamp(codes - REACH, codes + REACH)
        self.master.copy_((position - zero_point) * scale)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the current master weight, each (C,)."""
        return self.grid_of(self.master)

    @torch.no_grad()
    def grid_of(self, master: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point that another master weight would have, each (C,)."""
        if self.given is not None:
            return self.given[0], self.given[1]
        return minmax_grid(master, self.bits)

    @property
    def scale(self) -> Tensor:
        """Step per output channel, (C,)."""
        return self.grid()[0]

    @property
    def zero_point(self) -> Tensor:
        """Zero point per output channel, (C,)."""
        return self.grid()[1]

    def forward(self) -> Tensor:
        """Return the rounded weight."""
        if self.held is not None:
            return self.held
        scale, zero_point = self.grid()
        return straight_through(self.master, scale, zero_point, quant_max(self.bits))

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the integer codes."""
        codes = quantize(self.master, *self.grid(), quant_max(self.bits))
        return codes.to(torch.uint8)

    def freeze(self) -> FrozenWeight:
        """Return the constant quantizer."""
        return FrozenWeight(self.codes(), *self.grid(), self.bits)

    def extra_repr(self) -> str:
        """Describe the quantizer in one line."""
        return f"bits={self.bits}, shape={tuple(self.master.shape)}"


def minmax_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (C,) that span each channel's range, extended to contain zero.

    Args:
        weight: (C, ...) float.
        bits: 2 to 8.

    Example:
        >>> minmax_grid(torch.tensor([[-0.5, 1.0]]), 2)
        (tensor([0.5000]), tensor([1.]))
    """
    rest = tuple(range(1, weight.ndim))  # several times faster than `aminmax` of flattened rows
    low, high = weight.detach().amin(rest), weight.detach().amax(rest)
    return grid_of_range(low, high, quant_max(bits), True)


class TrackedActivation(ActivationQuantizer):
    """Per-tensor fake quantization with the running range of what it has seen.

    The running average is kept raw, with the number of its terms, and corrected for its start at
    zero when it is read. (Public code corrects what it stores, and so compounds the correction: its
    range is thousands of times too large after twenty batches.)

    Args:
        bits: 2 to 8.
        decay: of the running average.
        stop: let no gradient pass where a value was clamped.

    Attributes:
        tracking: True while batches move the range; otherwise a forward pass changes nothing.
        rounding: `to_grid`, or the same compiled while a loop runs (`zsq.tuning.fusing`).
        widen: turns a batch's smallest and largest value, (2,), into those of all processes that share
            it; only while tracking.
    """

    average: Tensor
    count: Tensor
    rounding: Rounding
    widen: Callable[[Tensor], Tensor] | None

    def __init__(self, bits: int, *, decay: float = 0.9, stop: bool = False) -> None:
        super().__init__(bits, log_scale=False)
        self.raw_scale.requires_grad_(False)
        self.decay, self.stop = decay, stop
        self.tracking = False
        self.rounding = to_grid
        self.widen = None
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))

    def range(self) -> Tensor:
        """Return the smallest and largest value, (2,)."""
        return self.average / (1 - self.decay**self.count).clamp(min=1e-12)

    @torch.no_grad()
    def track(self, x: Tensor) -> None:
        """Let a batch move the range."""
        extremes = torch.stack(x.detach().float().aminmax())
        if self.widen is not None:
            extremes = self.widen(extremes)
        self.average.mul_(self.decay).add_(extremes, alpha=1 - self.decay)
        self.count.add_(1)
        low, high = self.range()
        scale, zero_point = grid_of_range(low, high, quant_max(self.bits), True)
        self.raw_scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the quantizer's grid, gradient passing straight through or stopped."""
        if not self.enabled:
            return x
        if self.tracking:
            self.track(x)
        return straight_through(
            x, self.scale, self.zero_point, self.high, self.low, self.rounding, stop=self.stop
        )
