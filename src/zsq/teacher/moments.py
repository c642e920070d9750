# SPDX-License-Identifier: Apache-2.0
"""Sizes of a network's channels from its batch norms alone, before there is any image.

On the data that it was trained on, a batch norm puts out channels of mean beta and standard deviation
|gamma|. Taken as normal and independent, their moments pass through ReLU and additions in closed form
(Nagel et al., arXiv 1906.04721, section 4.2.1 and appendix C, for a single layer).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, operator_name

#: Operators with ``f(s * x) = s * f(x)`` that mix no values, or only those of one channel. Its moments are
#: taken over as they are, although pooling changes them: a stream counts its largest tensor.
WITHIN_CHANNELS = frozenset({
    "aten.dropout.default", "aten.flatten.using_ints", "aten.reshape.default", "aten.view.default",
    "aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_max_pool2d.default", "aten.mean.dim",
})  # fmt: skip


class Moments(NamedTuple):
    """Mean and variance of each channel, (C,)."""

    mean: Tensor
    variance: Tensor


@torch.no_grad()
def channel_squares(network: GraphModule) -> dict[str, Tensor]:
    """Return the expected mean square of every channel, by node, where batch norms tell it.

    Args:
        network: with its batch norms.

    Returns:
        (C,) for each node between batch norms and the next layers; others are missing.
    """
    known: dict[Node, Moments] = {}
    for node in network.graph.nodes:
        found = _moments(network, node, known)
        if found is not None:
            known[node] = found
    return {node.name: m.mean.square() + m.variance for node, m in known.items()}


def _moments(network: GraphModule, node: Node, known: dict[Node, Moments]) -> Moments | None:
    module = module_of(network, node)
    if isinstance(module, BatchNorm):
        return Moments(module.bias, module.weight.square())
    sources = tensor_inputs(node)
    if not sources or any(source not in known for source in sources):
        return None
    name = operator_name(node.target)
    if name == "aten.relu.default":
        return rectified(known[sources[0]])
    if name == "aten.add.Tensor" and len(sources) == 2:
        first, second = (known[source] for source in sources)
        return Moments(first.mean + second.mean, first.variance + second.variance)
    return known[sources[0]] if name in WITHIN_CHANNELS and len(sources) == 1 else None


def rectified(moments: Moments) -> Moments:
    """Return the moments of ``max(x, 0)`` for normal ``x``.

    Example:
        >>> mean, variance = rectified(Moments(torch.zeros(1), torch.ones(1)))
        >>> round(mean.item(), 4), round(variance.item(), 4)
        (0.3989, 0.3408)
    """
    mean, deviation = moments.mean, moments.variance.sqrt().clamp(min=1e-12)
    ratio = mean / deviation
    below = 0.5 * torch.erfc(-ratio / math.sqrt(2))
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    first = mean * below + deviation * density
    second = (mean.square() + deviation.square()) * below + mean * deviation * density
    return Moments(first, (second - first.square()).clamp(min=0))
