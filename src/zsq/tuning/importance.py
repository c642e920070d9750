# SPDX-License-Identifier: Apache-2.0
"""What an error in each channel of a tensor costs the teacher's predictions.

BRECQ (arXiv 2102.05426, section 3.2) weighs the squared error of a block's output by the diagonal of
the Fisher information of the network's predictions. Here the diagonal is averaged over images and
positions, one number a channel: single elements' estimates are too noisy to learn from. It is taken
of the float network, once, so that it does not depend on what was tuned before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy

from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.teacher.blocks import tap_nodes

#: Labels drawn from the predictions of each image.
DRAWS = 4
#: Images per pass.
PASS = 32
#: Least weight of a channel, of the mean: what no prediction depends on is still kept near.
FLOOR = 0.01


def channel_importance(
    network: GraphModule, names: Sequence[str], images: Tensor, context: Context
) -> dict[str, Tensor]:
    """Return the Fisher information of each channel of some tensors, relative to their mean.

    The Fisher information is the mean square of the gradient of ``log p(y)`` for labels ``y`` that are
    drawn from the predictions themselves (not from a data set).

    Args:
        network: float, with logits (N, classes) as its output.
        names: nodes with values (N, C, ...).
        images: (N, C, H, W), normalised.
        context: where to compute, and the seed of the labels.

    Returns:
        (C,) float32 by node, on the context's device; of mean 1 before the least weight is given.
    """
    tapped, device = tap_nodes(network, names), context.policy.device
    totals: dict[str, Tensor] = {}
    with seeded(context.seed, "importance"), torch.enable_grad():
        for part in torch.split(images, PASS):
            logits, *values = tapped(part.to(device).requires_grad_(True))
            likely = logits.detach().float().softmax(1).cpu()
            labels = torch.multinomial(likely, DRAWS, replacement=True).to(device)
            for i in range(DRAWS):
                loss = cross_entropy(logits.float(), labels[:, i], reduction="sum")
                found = torch.autograd.grad(loss, values, retain_graph=i < DRAWS - 1)
                for name, gradient in zip(names, found, strict=True):
                    total = _per_channel(gradient.float().square())
                    totals[name] = totals.get(name, torch.zeros_like(total)) + total
    return {name: context.group.first_says(_relative(total)) for name, total in totals.items()}


def _per_channel(squares: Tensor) -> Tensor:
    return squares.sum([d for d in range(squares.ndim) if d != 1])


def _relative(total: Tensor) -> Tensor:
    mean = total.mean()
    if not bool(mean > 0):  # certain predictions: nothing to tell channels apart by
        return torch.ones_like(total)
    return (total / mean).clamp(min=FLOOR)
