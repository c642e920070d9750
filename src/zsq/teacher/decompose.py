# SPDX-License-Identifier: Apache-2.0
"""Operators that are written out as matrix products, which can be quantized; as they are they could not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from zsq.teacher.layers import operator_name

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_EINSUM = torch.ops.aten.einsum.default


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.scaled_dot_product_attention`, without dropout, step by step."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def needs_writing_out(graph: Graph) -> bool:
    """Whether a graph holds such an operator."""
    names = {operator_name(_ATTENTION), operator_name(_EINSUM)}
    return any(n.op == "call_function" and operator_name(n.target) in names for n in graph.nodes)


def written_out() -> dict[Any, Any]:
    """Return what `torch.export.ExportedProgram.run_decompositions` is to put in their places."""
    return {_ATTENTION: attention, _EINSUM: torch.export.default_decompositions()[_EINSUM]}
