# SPDX-License-Identifier: Apache-2.0
"""The shift of GENIE's swing convolution: read the image one pixel up, down, left or right.

Padding by reflection and cropping at a random offset is the published form. Here the offset is a
choice on the device and shifting an axis a product with a 0/1 matrix: exact in any precision, no
host synchronisation, and its backward is a product too (a gather's would scatter).
"""

from __future__ import annotations

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


class Shift(nn.Module):
    """Shift the last two axes of images by at most one pixel, the same for the whole batch."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Shift ``x`` (N, C, H, W) by ``offsets`` (2,), vertical and horizontal, each 0, 1 or 2."""
        n, c, h, w = x.shape
        if min(h, w) < 2:
            return x  # a single row has no neighbour to reflect
        rows = x.permute(0, 2, 3, 1).reshape(n, h, w * c)
        rows = torch.matmul(shift_matrix(offsets[0], h, x.dtype), rows).reshape(n, h, w, c)
        columns = torch.matmul(shift_matrix(offsets[1], w, x.dtype), rows)
        return columns.permute(0, 3, 1, 2)


def random_offsets(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw ``count`` independent pairs of offsets, shape (count, 2), each 0, 1 or 2."""
    return torch.randint(3, (count, 2), device=device)
