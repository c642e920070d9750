# SPDX-License-Identifier: Apache-2.0
"""Tensors between layers: how large they are, and what rounding one of them does.

ZeroQ (arXiv 2001.00281) chooses the bits of weights; what it assumes and measures of them holds of
activations too, and low bits cost most there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.bits.sensitivity import PASS, by_width, logits_of
from zsq.config import Reconstruction
from zsq.functional.losses import kl_divergence
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import calibrate, copy_network, insert_quantizers, quantizer_path
from zsq.quantizers.protocol import Placement
from zsq.runtime.context import Context
from zsq.settings import Tuning
from zsq.teacher.inspect import node_shapes


def count_values(
    network: GraphModule, edges: Iterable[str], input_shape: tuple[int, ...]
) -> dict[str, int]:
    """Return how many values of one image each tensor has."""
    shapes = node_shapes(network, torch.zeros(1, *input_shape))
    return {name: shapes[name].numel() for name in edges}


@torch.no_grad()
def measure_edges(
    network: GraphModule, images: Tensor, edges: Sequence[str], candidates: Sequence[int],
    tuning: Tuning, context: Context,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """Return the divergence of the predictions with one tensor quantized, per tensor and bit-width.

    ``(1 / N) * sum_j KL(softmax(M(x_j)) || softmax(M_e,k(x_j)))`` where only tensor e is rounded, to
    k bits, in the range that the recipe starts from; weights stay float.

    Args:
        network: the float network that will be quantized; not changed.
        images: (N, C, H, W), normalised.
        edges: nodes whose results are quantized.
        candidates: bit-widths.
        tuning: says how ranges are chosen.
        context: device and progress.

    Returns:
        {node: {bits: divergence in nats}}.

    Raises:
        RunError: a divergence is NaN or infinite.
    """
    images = images.to(context.policy.device)
    wanted = logits_of(context.policy.placed_copy(network), images)
    found: dict[str, list[Tensor]] = {name: [] for name in edges}
    with context.reporter.task("sensitivity of activations", len(edges) * len(candidates)) as task:
        for bits in candidates:
            quantized, quantizers = _with_quantizers(network, images, edges, bits, tuning, context)
            for name, quantizer in quantizers.items():
                quantizer.enabled = True
                logits = logits_of(quantized, images)
                quantizer.enabled = False
                found[name].append(kl_divergence(logits.double(), wanted, 1.0, "sample"))
                task.advance(1, loss=found[name][-1])
    return {name: by_width(name, candidates, values) for name, values in found.items()}


def _with_quantizers(
    network: GraphModule, images: Tensor, edges: Sequence[str], bits: int, tuning: Tuning,
    context: Context,
) -> tuple[GraphModule, dict[str, ActivationQuantizer]]:  # fmt: skip
    """Return a copy with calibrated quantizers on its edges, all of them off."""
    made: dict[str, ActivationQuantizer] = {}
    copied = copy_network(network)
    insert_quantizers(
        copied, Placement("", {}, dict.fromkeys(edges, bits), {}), ActivationQuantizer
    )
    for name in edges:
        quantizer = copied.get_submodule(quantizer_path(name))
        assert isinstance(quantizer, ActivationQuantizer)
        quantizer.enabled, made[name] = False, quantizer
    placed = context.policy.place(copied)
    calibrate(
        placed, made, list(torch.split(images, PASS)), power=tuning.power, asymmetric=tuning.asymmetric,
        rule="error" if isinstance(tuning, Reconstruction) else tuning.ranges, percentile=tuning.percentile,
    )  # fmt: skip
    return placed, made
