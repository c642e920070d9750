# SPDX-License-Identifier: Apache-2.0
"""Packing integer codes of 2 to 8 bits into bytes, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zsq.errors import UsageError


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely, least significant bit first.

    Args:
        codes: any shape, whole numbers in 0 .. 2**bits - 1.
        bits: 1 to 8.

    Returns:
        uint8 tensor of ``ceil(numel * bits / 8)`` bytes.

    Raises:
        UsageError: a code does not fit.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist()
        [57]
    """
    whole = codes.detach().cpu().flatten()
    for extreme in (int(whole.min()), int(whole.max())) if whole.numel() else ():
        if not 0 <= extreme < 2**bits:
            raise UsageError(f"code {extreme} does not fit in {bits} bits.")
    flat = whole.to(torch.uint8).numpy()
    spread = np.unpackbits(flat[:, None], axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(spread.reshape(-1), bitorder="little").copy())


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: uint8 bytes.
        bits: 1 to 8.
        shape: of the codes.

    Returns:
        uint8 tensor of ``shape``.

    Raises:
        UsageError: too few bytes for that shape.
    """
    count = int(np.prod(shape)) if shape else 1
    raw = packed.detach().cpu().numpy()
    if raw.size != -(-count * bits // 8):
        raise UsageError(
            f"{raw.size} packed bytes do not hold {count} codes of {bits} bits; the file is "
            "damaged."
        )
    spread = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    codes = np.packbits(spread, axis=1, bitorder="little").reshape(shape)
    return torch.from_numpy(codes.copy())
