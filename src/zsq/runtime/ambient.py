# SPDX-License-Identifier: Apache-2.0
"""What a caller may have told PyTorch to do everywhere, and what zsq computes under instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_modes() -> Iterator[None]:
    """Compute with gradients, in float32 on the CPU unless said otherwise, without autocast.

    Scripts that quantize often also evaluate, under ``torch.no_grad()``, ``inference_mode()`` or
    ``autocast``, with another default type or device. Within this block, or a function that it
    decorates, none of these holds; afterwards they do again.

    Example:
        >>> with torch.no_grad(), own_modes():
        ...     torch.is_grad_enabled()
        True
    """
    kept = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(kept)
