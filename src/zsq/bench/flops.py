# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a step's passes are.

Counted on an eager run: what convolutions and matrix products do, forward and backward, two
operations (a multiplication and an addition) for each multiply-accumulate. Everything else counts
nothing, recurrent layers among it, which PyTorch computes as one operator each. A gradient that is not
asked for is not counted, so a frozen network's passes are two forward passes' worth and a trained one's
three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(step: Callable[[], object]) -> int:
    """Return the floating-point operations of one call.

    Args:
        step: eager code; operations inside compiled functions may not be seen.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
        >>> count_flops(lambda: a @ b)
        60
    """
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return int(counter.get_total_flops())


def _convolution_backward(
    grad_shape: Sequence[int], x_shape: Sequence[int], weight_shape: Sequence[int], bias: Any,
    stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
    output_mask: Sequence[bool], **ignored: Any,
) -> int:  # fmt: skip
    """Return the operations of a convolution's gradients: as many as its forward pass for each.

    PyTorch's own formula takes the weight's gradient of a grouped convolution for a dense one's.
    """
    places = math.prod(x_shape if transposed else grad_shape) // weight_shape[0]
    forward = 2 * places * math.prod(weight_shape)
    return forward * (int(output_mask[0]) + int(output_mask[1]))
