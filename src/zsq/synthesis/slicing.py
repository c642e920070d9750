# SPDX-License-Identifier: Apache-2.0
"""Batches that do not fit the memory: the teacher sees them a slice at a time, with the same result.

The loss looks at a batch only through sums over its elements. So a first pass without gradients adds
up the sums of all slices; the loss's gradient with respect to the sums is then known, and a second
pass takes it back to the images, slice by slice. That costs one more forward pass of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: Memory at work beside what the backward pass keeps: gradients, temporary copies.
AT_WORK = 1.5

Sums = Callable[[Tensor, Tensor | None], list[Tensor]]
"""images and offsets -> sums over the elements of each layer."""


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, offsets: Tensor | None, sums: Sums,
        weigh: Callable[[Sequence[Tensor]], Tensor], size: int,
    ) -> Tensor:  # fmt: skip
        totals: list[Tensor] = []
        for part in torch.split(images, size):
            found = sums(part, offsets)
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        leaves = [total.detach().requires_grad_() for total in totals]
        with torch.enable_grad():
            loss = weigh(leaves)
            ctx.slopes = torch.autograd.grad(loss, leaves)
        ctx.sums, ctx.size = sums, size
        ctx.save_for_backward(images, offsets)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, offsets = ctx.saved_tensors
        slopes, found = [slope * gradient for slope in ctx.slopes], []
        for part in torch.split(images, ctx.size):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                sums = ctx.sums(leaf, offsets)
            found.append(torch.autograd.grad(sums, leaf, slopes)[0])
        return torch.cat(found), None, None, None, None


def sliced_loss(
    images: Tensor, offsets: Tensor | None, sums: Sums,
    weigh: Callable[[Sequence[Tensor]], Tensor], size: int,
) -> Tensor:  # fmt: skip
    """Return a loss of sums over a batch; only one slice of the batch is in flight at a time.

    Args:
        images: (N, ...); gradients reach them.
        offsets: handed to ``sums``, the same for all slices.
        sums: tensors that add up over slices. Called twice a slice, so it must not draw at random.
        weigh: the loss of the sums of the whole batch.
        size: images per slice.

    Returns:
        A scalar.
    """
    return _Sliced.apply(images, offsets, sums, weigh, size)  # type: ignore[no-any-return,no-untyped-call]


def kept_bytes(function: Callable[[], object]) -> int:
    """Return how many bytes a backward pass of ``function`` would need to be kept.

    Every storage counts once.
    """
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)  # so that no address is used twice
        # a tensor of the graph would hold the graph, which holds it: for good
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def kept_per_image(function: Callable[[int], object]) -> int:
    """Return how many of these bytes each image more needs.

    Args:
        function: of a number of images.
    """
    two, four = (kept_bytes(partial(function, count)) for count in (2, 4))
    return (four - two) // 2


def slice_size(batch: int, fixed: int, per_image: int, memory: int) -> int:
    """Return how many images the teacher may see at a time.

    Args:
        batch: images of the whole batch.
        fixed: bytes that are needed whatever the size of a slice.
        per_image: bytes that the teacher keeps for an image.
        memory: bytes there are.

    Returns:
        ``batch`` where all fits, else as many as fit when slices are as equal as possible; at least 1.

    Example:
        >>> slice_size(128, 0, 100, 100_000), slice_size(128, 4_000, 100, 10_000)
        (128, 32)
    """
    room = int((memory - fixed) / (AT_WORK * per_image)) if per_image else batch
    slices = math.ceil(batch / max(1, min(room, batch)))
    return math.ceil(batch / slices)
