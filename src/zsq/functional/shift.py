# SPDX-License-Identifier: Apache-2.0
"""The shift of GENIE's swing convolution: read the image one pixel up, down, left or right.

Padding by reflection and cropping at a random offset is the published form. On an accelerator the
offset stays there and shifting an axis is a product with a 0/1 matrix: exact in any precision, no host
synchronisation, and its backward is a product too (a gather's would scatter). A CPU has nothing to
wait for: it copies the parts of the image that stay together, as an operator of our own, so that a
compiler asks for the offsets when it runs and not when it compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn


def shift_matrix(offset: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return the (length, length) matrix that shifts an axis, reflecting at its ends.

    Args:
        offset: scalar integer 0, 1 or 2, where the crop starts in the padded axis; 1 is no shift.
        length: elements along the axis, at least 2.
        dtype: of the matrix.

    Example:
        >>> matrix = shift_matrix(torch.tensor(0), 3, torch.float32)
        >>> (matrix @ torch.tensor([1.0, 2.0, 3.0])).tolist()
        [2.0, 1.0, 2.0]
    """
    position = torch.arange(length, device=offset.device)
    source = (position + offset - 1).abs()
    source = (length - 1) - ((length - 1) - source).abs()
    return (source[:, None] == position[None, :]).to(dtype)


Region = tuple[EllipsisType, slice, slice]


def _runs(offset: int) -> list[tuple[slice, slice]]:
    """Return (to, from) for the parts of an axis that move as one."""
    if offset == 1:
        return [(slice(None), slice(None))]
    if offset == 0:
        return [(slice(1, None), slice(0, -1)), (slice(0, 1), slice(1, 2))]
    return [(slice(0, -1), slice(1, None)), (slice(-1, None), slice(-2, -1))]


def _regions(offsets: Tensor) -> Iterator[tuple[Region, Region]]:
    """Yield (to, from) for the parts of images (N, C, H, W) that move as one."""
    dy, dx = offsets.tolist()
    for (to_row, row), (to_column, column) in product(_runs(dy), _runs(dx)):
        yield (..., to_row, to_column), (..., row, column)


@torch.library.custom_op("zsq::shift", mutates_args=(), device_types="cpu")
def _copied(x: Tensor, offsets: Tensor) -> Tensor:
    """Shift by copies; as `Shift`."""
    shifted = torch.empty_like(x)
    for to, source in _regions(offsets):
        shifted[to] = x[source]
    return shifted


@torch.library.custom_op("zsq::shift_backward", mutates_args=(), device_types="cpu")
def _added(gradient: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Add what `_copied` took to where it took it from: its transpose.

    Of ``x`` only shape and layout matter. But as long as the backward pass asks for it, a compiler
    keeps it, and needs no mask for the backward pass of the ReLU before: on a CPU writing one costs
    more than the convolution after it.
    """
    added = torch.zeros_like(x)
    for to, source in _regions(offsets):
        added[source] += gradient[to]
    return added


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.zsq.shift_backward(gradient, *ctx.saved_tensors), None


_copied.register_fake(lambda x, offsets: torch.empty_like(x))
_added.register_fake(lambda gradient, x, offsets: torch.empty_like(x))
_copied.register_autograd(_backward, setup_context=_keep_inputs)


class Shift(nn.Module):
    """Shift the last two axes of images by at most one pixel, the same for a whole batch."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Shift ``x`` (N, C, H, W) by ``offsets`` (2,), vertical and horizontal, each 0, 1 or 2.

        Offsets (batches, 2) shift each of so many batches, of equal size and next to each other.
        """
        if offsets.ndim == 2:
            parts = zip(x.chunk(len(offsets)), offsets, strict=True)
            shifted = [self(part, own) for part, own in parts]
            return shifted[0] if len(shifted) == 1 else torch.cat(shifted)
        if min(x.shape[2:]) < 2:
            return x  # a single row has no neighbour to reflect
        if x.device.type == "cpu":
            return _copied(x, offsets)  # type: ignore[no-any-return]
        return self.multiplied(x, offsets)

    @staticmethod
    def multiplied(x: Tensor, offsets: Tensor) -> Tensor:
        """Return the same by products, wherever ``x`` and ``offsets`` are."""
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(n, h, w * c)
        rows = torch.matmul(shift_matrix(offsets[0], h, x.dtype), rows).reshape(n, h, w, c)
        columns = torch.matmul(shift_matrix(offsets[1], w, x.dtype), rows)
        return columns.permute(0, 3, 1, 2)


def random_offsets(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw ``count`` independent pairs of offsets, shape (count, 2), each 0, 1 or 2."""
    return torch.randint(3, (count, 2), device=device)
