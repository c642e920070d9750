# SPDX-License-Identifier: Apache-2.0
"""How much a network's answers move when one layer's weights are quantized (ZeroQ, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zsq.errors import RunError
from zsq.functional.losses import kl_divergence
from zsq.runtime.context import Context
from zsq.settings import Tuning
from zsq.student import rounded_weight
from zsq.teacher.layers import Layer

#: Images per pass.
PASS = 64


@torch.no_grad()
def measure_sensitivity(
    network: GraphModule, images: Tensor, layers: Iterable[str], candidates: Sequence[int],
    tuning: Tuning, context: Context,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """Return the divergence of the predictions with one layer quantized, per layer and bit-width.

    ``(1 / N) * sum_j KL(softmax(M(x_j)) || softmax(M_i,k(x_j)))`` where only the weights of layer i
    are rounded, to k bits; activations stay float.

    Args:
        network: the float network that will be quantized; not changed.
        images: (N, C, H, W), normalised.
        layers: module paths.
        candidates: bit-widths.
        tuning: says on which grid weights are rounded at first.
        context: device and progress.

    Returns:
        {path: {bits: divergence in nats}}.

    Raises:
        RunError: a divergence is NaN or infinite.
    """
    network = context.policy.placed_copy(network)
    images = images.to(context.policy.device)
    wanted = logits_of(network, images)
    found: dict[str, dict[int, float]] = {}
    paths = list(layers)
    with context.reporter.task("sensitivity", len(paths) * len(candidates)) as task:
        for path in paths:
            divergences = []
            for bits in candidates:
                logits = _with_rounded(network, path, bits, tuning, images)
                divergences.append(kl_divergence(logits.double(), wanted, 1.0, "sample"))
                task.advance(1, loss=divergences[-1])
            found[path] = by_width(path, candidates, divergences)
    return found


def by_width(
    name: str, candidates: Sequence[int], divergences: Sequence[Tensor]
) -> dict[int, float]:
    """Return divergences as numbers by bit-width, rounding errors below 0 as 0.

    Raises:
        RunError: one is NaN or infinite.
    """
    values = torch.stack(list(divergences)).tolist()
    for bits, value in zip(candidates, values, strict=True):
        if not math.isfinite(value):
            raise RunError(
                f"the divergence with {name} at {bits} bits is {value}, so no bits can be chosen; look for weights "
                "or images that are NaN or very large."
            )
    return {bits: max(value, 0.0) for bits, value in zip(candidates, values, strict=True)}


def _with_rounded(
    network: GraphModule, path: str, bits: int, tuning: Tuning, images: Tensor
) -> Tensor:  # fmt: skip
    layer = network.get_submodule(path)
    assert isinstance(layer, Layer)
    kept = layer.weight
    rounded = rounded_weight(layer, bits, tuning)
    layer.weight = nn.Parameter(rounded, requires_grad=False)
    try:
        return logits_of(network, images)
    finally:
        layer.weight = kept


def logits_of(network: GraphModule, images: Tensor) -> Tensor:
    """Return the float32 logits of images, computed `PASS` at a time."""
    return torch.cat([network(part).float() for part in torch.split(images, PASS)])
