# SPDX-License-Identifier: Apache-2.0
"""What a caller may have told PyTorch to do everywhere, and what zsq computes under instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch

#: torch.export patches PyTorch while it reads a network, and random numbers come from the generators of
#: the whole process: of several threads one computes at a time.
_TURN = RLock()


@contextmanager
def own_modes(*, alone: bool = True) -> Iterator[None]:
    """Compute with gradients, in float32 on the CPU unless said otherwise, without autocast.

    Scripts that quantize often also evaluate, under ``torch.no_grad()``, ``inference_mode()`` or
    ``autocast``, with another default type or device. Within this block, or a function that it
    decorates, none of these holds; afterwards they do again. Threads take turns. On a GPU convolutions of
    float32 are then computed in float32 (PyTorch's default there has ten bits of fraction, TF32: an
    eighth of a code at 8 bits), and by algorithms that add up in the same order every time.

    Args:
        alone: wait while another thread is in such a block; False for what neither exports nor draws.

    Example:
        >>> with torch.no_grad(), own_modes():
        ...     torch.is_grad_enabled()
        True
    """
    kept = torch.get_default_dtype()
    with ExitStack() as stack:
        if alone:
            stack.enter_context(_TURN)
            stack.enter_context(_exact_convolutions())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if kept != torch.float32:  # which is the whole process's: other threads see it
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, kept)
        yield


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Have cuDNN compute float32 as float32, and the same way every time.

    PyTorch has an older flag for all of cuDNN and newer ones by kind of operator. `torch.export` reads the
    older one, which raises wherever the two contradict each other; so it is the one that is set.
    """
    backends: Any = torch.backends
    cudnn = backends.cudnn
    places = (backends, cudnn, cudnn.conv, cudnn.rnn)
    precisions, deterministic = [place.fp32_precision for place in places], cudnn.deterministic
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # told kind by kind
        allowed = True
    try:
        cudnn.deterministic = True
        for place in (backends, cudnn):  # of which the kinds take what is not said of themselves
            if place.fp32_precision != "none":
                place.fp32_precision = "none"
        cudnn.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32 = allowed
        for place, precision in zip(places, precisions, strict=True):
            if place.fp32_precision != precision:
                place.fp32_precision = precision
        cudnn.deterministic = deterministic
