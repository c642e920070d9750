# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: the rectified sigmoid of AdaRound and its regulariser (arXiv 2004.10568)."""

from __future__ import annotations

import torch
from torch import Tensor

#: The sigmoid is stretched to (GAMMA, ZETA) and clipped to [0, 1], so that it reaches both ends.
ZETA, GAMMA = 1.1, -0.1


class _RectifiedSigmoid(torch.autograd.Function):
    """Forward and backward in a handful of operations: weights are small, dispatching is not."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, v: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(v)
        ctx.save_for_backward(sigmoid)
        return sigmoid.mul(ZETA - GAMMA).add_(GAMMA).clamp_(0.0, 1.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (sigmoid,) = ctx.saved_tensors  # type: ignore[attr-defined]
        # the sigmoid's own slope between its cut-offs, 0 beyond
        low, high = -GAMMA / (ZETA - GAMMA), (1 - GAMMA) / (ZETA - GAMMA)
        inside = sigmoid.clamp(low, high).eq_(sigmoid)
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(inside)
        return slope.mul_(gradient).mul_(ZETA - GAMMA)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Map ``v`` to a soft bit in [0, 1]: ``clip(sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)``.

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return _RectifiedSigmoid.apply(v)  # type: ignore[no-any-return,no-untyped-call]


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """Return the ``v`` whose soft bit is ``h``, for ``h`` in [0, 1].

    Example:
        >>> h = torch.tensor([0.0, 0.3, 0.99])
        >>> torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-6)
        True
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)


class _RoundingRegularizer(torch.autograd.Function):
    """One power serves value and gradient."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, h: Tensor, beta: float | Tensor
    ) -> Tensor:
        centered = 2.0 * h - 1.0
        distance = centered.abs()
        power = distance.pow(beta - 1.0)
        ctx.save_for_backward(centered, power)
        ctx.beta = beta  # type: ignore[attr-defined]
        return h.numel() - torch.dot(power.flatten(), distance.flatten())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        centered, power = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.sign(centered).mul_(power).mul_(-2.0 * ctx.beta * gradient), None  # type: ignore[attr-defined]


def rounding_regularizer(h: Tensor, beta: float | Tensor) -> Tensor:
    """Sum of ``1 - |2h - 1|**beta``: 0 where a bit is decided, 1 where it is at one half.

    Args:
        h: soft bits, any shape, in [0, 1].
        beta: exponent above 1, a number or a scalar; large values only pull bits that are nearly decided.

    Returns:
        A scalar.
    """
    return _RoundingRegularizer.apply(h, beta)  # type: ignore[no-any-return,no-untyped-call]


def beta_at(
    step: int, steps: int, *, start: float = 20.0, end: float = 2.0, warmup: float = 0.2
) -> float:
    """Return the regulariser's exponent at ``step`` of ``steps``: flat, then linear to ``end``.

    Args:
        step: 0-based.
        steps: length of the run.
        start: value during the warm-up.
        end: value at the last step.
        warmup: share of the run during which the regulariser is off.

    Example:
        >>> beta_at(0, 100), beta_at(60, 100), beta_at(100, 100)
        (20.0, 11.0, 2.0)
    """
    begin = warmup * steps
    if step < begin:
        return start
    return end + (start - end) * max(0.0, 1.0 - (step - begin) / max(steps - begin, 1e-9))
