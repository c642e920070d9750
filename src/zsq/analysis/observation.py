# SPDX-License-Identifier: Apache-2.0
"""What a teacher makes of a set of images, read in passes so that memory does not grow with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.errors import UsageError
from zsq.synthesis.batches import PASS
from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer
from zsq.teacher.taps import batch_norm_nodes, classifier_node
from zsq.teacher.teacher import Teacher


@dataclass(frozen=True)
class Observation:
    """A teacher's view of N images.

    Attributes:
        top: (N,) the largest probability.
        predictions: (N,) int64, the class that has it.
        features: (N, F) what the classifier reads, averaged over positions; the logits where no
            single layer classifies.
        classes: number of logits.
        distances: per batch norm, the squared differences of the set's mean and biased variance
            from the stored ones, averaged over channels; in execution order.
    """

    top: Tensor
    predictions: Tensor
    features: Tensor
    classes: int
    distances: dict[str, float]


class Moments:
    """Mean and biased variance per channel of everything added so far, in float64.

    Example:
        >>> moments = Moments()
        >>> for part in torch.tensor([[1.0], [2.0], [6.0]]).split(2):
        ...     moments.add(*channel_moments(part))
        >>> moments.mean.tolist(), round(moments.variance.item(), 4)
        ([3.0], 4.6667)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.variance = torch.zeros((), dtype=torch.float64)

    def add(self, variance: Tensor, mean: Tensor, count: int) -> None:
        """Merge the moments of ``count`` more values per channel (Chan, Golub, LeVeque 1979)."""
        share = count / (self.count + count)
        shift = mean.double().cpu() - self.mean
        between = share * (1 - share) * shift**2
        self.variance = (1 - share) * self.variance + share * variance.double().cpu() + between
        self.mean = self.mean + share * shift
        self.count += count


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return biased variance and mean of each channel of (N, C, ...), and the values per channel."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x.float(), axes, correction=0)
    return variance, mean, x.numel() // x.shape[1]


def pool_positions(x: Tensor, channels: int) -> Tensor:
    """Average features over positions: (N, ..., F, ...) with F on axis ``channels`` -> (N, F).

    Example:
        >>> pool_positions(torch.arange(8.0).reshape(1, 2, 2, 2), 1).tolist()
        [[1.5, 5.5]]
    """
    moved = x.float().movedim(channels, 1)
    return moved.flatten(2).mean(2) if x.ndim > 2 else moved


@torch.no_grad()
def observe(teacher: Teacher, images: Tensor) -> Observation:
    """Look at images with a copy of a teacher.

    Args:
        teacher: with batch norms or without.
        images: (N, C, H, W), finite, at least one.
    """
    watching, paths = _watching(teacher.network)
    parameter = next(watching.parameters(), images)
    moments = [Moments() for _ in paths]
    top, predictions, features = [], [], []
    classes = 0
    for part in torch.split(images, PASS):
        logits, pooled, measured = watching(part.to(parameter.device))
        for total, values in zip(moments, measured, strict=True):
            total.add(*values)
        best = logits.float().softmax(1).max(1)
        top.append(best.values.cpu())
        predictions.append(best.indices.cpu())
        features.append(pooled.cpu())
        classes = logits.shape[1]
    distances = {
        path: _distance(teacher.network.get_submodule(path), total)
        for path, total in zip(paths, moments, strict=True)
    }
    return Observation(
        torch.cat(top), torch.cat(predictions), torch.cat(features), classes, distances
    )


def _watching(network: GraphModule) -> tuple[GraphModule, list[str]]:
    """Copy a network so that it returns (logits, pooled features, moments of batch norm inputs).

    The moments are taken inside the graph: each batch norm's input is freed as soon as it is used.
    """
    copied = copy.deepcopy(network)
    graph = copied.graph
    output = next(n for n in graph.nodes if n.op == "output")
    logits: Node = output.all_input_nodes[0]
    source, channels = _feature_source(copied) or (logits, 1)
    taps = batch_norm_nodes(copied)
    measured = []
    for node in taps:
        with graph.inserting_before(node):
            measured.append(graph.call_function(channel_moments, (node.args[0],)))
    with graph.inserting_before(output):
        pooled = graph.call_function(pool_positions, (source, channels))
    output.args = ((logits, pooled, tuple(measured)),)
    graph.lint()
    copied.recompile()
    return copied.eval().requires_grad_(False), [str(node.target) for node in taps]


def _feature_source(network: GraphModule) -> tuple[Node, int] | None:
    """Return what the classifier reads and its axis of channels; None without a classifier."""
    try:
        classifier = classifier_node(network)
    except UsageError:
        return None
    layer = module_of(network, classifier)
    return tensor_inputs(classifier)[0], -1 if isinstance(layer, Layer) and layer.is_linear else 1


def _distance(norm: object, seen: Moments) -> float:
    assert isinstance(norm, BatchNorm)
    mean, variance = (x.detach().double().cpu() for x in (norm.running_mean, norm.running_var))
    return float(((seen.mean - mean) ** 2 + (seen.variance - variance) ** 2).mean())
