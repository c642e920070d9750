# SPDX-License-Identifier: Apache-2.0
"""Affine quantization as pure functions: codes, scales, zero points, and the search for them.

One convention everywhere: ``b`` bits mean the integer codes ``0 .. 2**b - 1``; a code ``q`` stands
for ``(q - zero_point) * scale``; ``zero_point`` is an integer inside the code range, so that zero
is exact. Signed integers are a matter of storage (`zsq.quantizers.packing`), not of arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zsq.errors import UsageError

#: Steps below this are raised to it: an all-zero channel has no range of its own.
SMALLEST_SCALE = 1e-8


def quant_max(bits: int) -> int:
    """Return the largest code of ``bits`` bits.

    Args:
        bits: 2 to 8.

    Raises:
        UsageError: ``bits`` is out of range.

    Example:
        >>> quant_max(4)
        15
    """
    if not 2 <= bits <= 8:
        raise UsageError(f"bits (={bits}) must be in 2..8.")
    return 2**bits - 1  # type: ignore[no-any-return]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (C,) ``values`` so that they broadcast along axis 0 of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, high: int, low: int = 0) -> Tensor:
    """Return the integer codes of ``x``, as floats (exact: they are at most 255).

    Args:
        x: any shape.
        scale: scalar, or (C,) for one scale per index of axis 0.
        zero_point: like ``scale``.
        high: largest code.
        low: smallest code.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.26, 9.0])
        >>> quantize(x, torch.tensor(0.1), torch.tensor(0), 15).tolist()
        [0.0, 0.0, 3.0, 15.0]
    """
    s, z = per_channel(scale, x), per_channel(zero_point, x)
    return torch.clamp(torch.round(x / s) + z, low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values that ``codes`` stand for: ``(codes - zero_point) * scale``."""
    return (codes.to(scale.dtype) - per_channel(zero_point, codes)) * per_channel(scale, codes)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize with LSQ's gradients, keeping two tensors for the backward pass.

    Written out because autograd's own version of the same formula stores and re-reads eight tensors
    of the activation's size, which is what a step on small blocks spends its time on. Masks are
    floats of the data's own layout: such operations run vectorised, boolean selections do not.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, keep: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ratio = x / scale
        clipped = ratio.clamp(low - zero_point, high - zero_point)
        rounded = torch.round(clipped)
        inside = clipped.eq_(ratio)  # in place: 1.0 or 0.0
        # d/ds is (rounded - ratio) inside and the clipped code outside
        slope = torch.addcmul(rounded, ratio, inside, value=-1)
        values = rounded.mul_(scale)
        if keep is not None:
            values = torch.lerp(values, x, keep)  # exact at weights 0 and 1
            slope = torch.addcmul(slope, slope, keep, value=-1)
            inside = torch.maximum(inside, keep)
        ctx.save_for_backward(inside, slope)
        return values

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        inside, slope = ctx.saved_tensors  # type: ignore[attr-defined]
        to_x = gradient * inside if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        to_scale = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            to_scale = (gradient * slope).sum()
        return to_x, to_scale, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    high: int,
    low: int = 0,
    keep: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize ``x`` with one scale for the whole tensor (LSQ, arXiv 1902.08153).

    Gradients: 1 to ``x`` where ``x / scale + zero_point`` lies in [low, high], else 0; to ``scale``
    ``round(x / scale) - x / scale`` inside and the clipped code (less the zero point) outside.

    Args:
        x: any shape, float32.
        scale: scalar tensor, positive.
        zero_point: scalar tensor holding an integer.
        high: largest code.
        low: smallest code.
        keep: optional mask of ``x``'s shape, boolean or 0.0 and 1.0; elements where it is 1 pass
            through unquantized (QDrop). Fastest as floats with the strides of ``x``.

    Returns:
        A tensor of ``x``'s shape.

    Example:
        >>> fake_quantize(torch.tensor([0.26, 9.0]), torch.tensor(0.1), torch.tensor(0.0), 15)
        tensor([0.3000, 1.5000])
    """
    if keep is None and not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
        # the same numbers without what only a backward pass needs: half the time
        codes = (x / scale).clamp_(low - zero_point, high - zero_point).round_()
        return codes.mul_(scale)
    mask = None if keep is None else keep.to(x.dtype)
    return _FakeQuantize.apply(x, scale, zero_point, low, high, mask)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of a tensor, or of each of its channels.

    Attributes:
        scale: scalar or (C,), float32.
        zero_point: like ``scale``, whole numbers stored as float32.
        error: mean of ``|x - x^|**p`` that the search ended at, like ``scale``.
    """

    scale: Tensor
    zero_point: Tensor
    error: Tensor


def grid_of_range(
    low: Tensor, high: Tensor, codes: int, zero_in_range: bool
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a grid that spans a range.

    Args:
        low: smallest value; scalar or one per channel.
        high: largest value, likewise.
        codes: number of steps.
        zero_in_range: extend the range to contain zero, so that the zero point is a code.
    """
    if zero_in_range:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / codes).clamp(min=SMALLEST_SCALE)
    zero_point = torch.round(-low / scale)
    return scale, zero_point.clamp(0, codes) if zero_in_range else zero_point


def _error(x: Tensor, scale: Tensor, zero_point: Tensor, codes: int, power: float) -> Tensor:
    s, z = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    rounded = torch.round(x / s).clamp_(-z, codes - z).mul_(s)
    return rounded.sub_(x).abs_().pow_(power).mean(-1)


def _search(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, power: float, candidates: int,
    zero_in_range: bool, fixed_zero_point: int | None = None,
) -> Grid:  # fmt: skip
    codes = quant_max(bits)
    best: Grid | None = None
    for step in range(candidates):
        ratio = 1.0 - step / candidates
        scale, zero_point = grid_of_range(low * ratio, high * ratio, codes, zero_in_range)
        if fixed_zero_point is not None:
            zero_point = torch.full_like(scale, fixed_zero_point)
        error = _error(x, scale, zero_point, codes, power)
        if best is None:
            best = Grid(scale, zero_point, error)
            continue
        better = error < best.error
        best = Grid(
            torch.where(better, scale, best.scale),
            torch.where(better, zero_point, best.zero_point),
            torch.where(better, error, best.error),
        )
    assert best is not None
    return best


@torch.no_grad()
def search_weight_grid(
    weight: Tensor,
    bits: int,
    *,
    power: float = 2.4,
    candidates: int = 100,
    zero_in_range: bool = True,
    centred: bool = False,
) -> Grid:
    """Find each output channel's grid: min and max shrunk together (GENIE, BRECQ).

    Args:
        weight: (C, ...) float tensor.
        bits: 2 to 8.
        power: exponent of the error ``mean |w - w^|**power``.
        candidates: ratios tried: 1, 1 - 1/candidates, ... 1/candidates.
        zero_in_range: extend one-sided channels to contain 0, so that the zero point is a code.
            Integer hardware needs it; the published code does without.
        centred: put every zero point in the middle, as some integer kernels ask for.

    Returns:
        Scale and zero point of shape (C,).

    Example:
        >>> grid = search_weight_grid(torch.tensor([[-0.7, 0.8]]), 4)
        >>> bool((grid.zero_point == 7).all())
        True
    """
    flat = weight.detach().flatten(1).float()
    low, high, middle = flat.amin(1), flat.amax(1), None
    if centred:
        high = torch.maximum(low.abs(), high.abs())
        low, middle = -high, 2 ** (bits - 1)
    return _search(
        flat, low, high, bits,
        power=power, candidates=candidates, zero_in_range=zero_in_range, fixed_zero_point=middle,
    )  # fmt: skip


@torch.no_grad()
def search_activation_grid(
    x: Tensor, bits: int, *, power: float = 2.4, candidates: int = 100, asymmetric: bool = True
) -> Grid:
    """Find one grid for an activation tensor.

    Data without negative values gets codes from zero up. Two-sided data gets the better of a
    symmetric grid (zero point in the middle, as published) and, if ``asymmetric``, one whose two
    ends shrink together: it wastes no codes on the short tail of SiLU or hard-swish.

    Args:
        x: any shape; pass a sample of some 10,000 to 1,000,000 elements.
        bits: 2 to 8.
        power: exponent of the error.
        candidates: ratios tried.
        asymmetric: whether two-sided data may have an off-centre zero point.

    Returns:
        Scalar scale and zero point.
    """
    flat = x.detach().flatten().float().unsqueeze(0)
    low, high = flat.amin(1), flat.amax(1)
    extreme = torch.maximum(low.abs(), high.abs())
    settings = {"power": power, "candidates": candidates, "zero_in_range": True}
    if bool(low >= 0):
        best = _search(flat, torch.zeros_like(low), high, bits, fixed_zero_point=0, **settings)  # type: ignore[arg-type]
    else:
        middle = 2 ** (bits - 1)
        best = _search(flat, -extreme, extreme, bits, fixed_zero_point=middle, **settings)  # type: ignore[arg-type]
        if asymmetric:
            other = _search(flat, low, high, bits, **settings)  # type: ignore[arg-type]
            best = other if bool(other.error < best.error) else best
    return Grid(best.scale[0], best.zero_point[0], best.error[0])
