# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: the same function with channels of similar range.

One step serves all channels of a tensor, so a channel of small range is left with few levels. Where
everything between what writes a tensor (a layer, or a batch norm) and the layers that read it is positively
homogeneous (ReLU, additions, pooling), a factor per channel can move from the one to the other
without changing what the network computes (Nagel et al., arXiv 1906.04721, section 4.1; here for
whole residual streams, with ranges of the activations).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.runtime.policy import channels_last
from zsq.teacher.channels import channel_axes, input_axis
from zsq.teacher.fold import calls, fold_batch_norms, module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer, operator_name
from zsq.teacher.moments import WITHIN_CHANNELS, channel_squares
from zsq.teacher.teacher import Teacher

#: Operators with ``f(s * x) = s * f(x)`` for every ``s > 0`` per channel.
HOMOGENEOUS = WITHIN_CHANNELS | {
    "aten.relu.default", "aten.leaky_relu.default", "aten.add.Tensor",
}  # fmt: skip
#: Factors are kept in [1 / LIMIT, LIMIT].
LIMIT = 16.0


@dataclass
class Stream:
    """Tensors that share their channels' factors.

    Attributes:
        writers: nodes of the layers and batch norms whose output channels carry them.
        readers: nodes of the layers whose input channels undo them.
        tensors: the nodes whose ranges count.
        axes: of each writer and tensor, by node: the axis that its channels are on.
        fixed: something else reads or writes the channels, so they stay as they are.
    """

    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    tensors: list[Node] = field(default_factory=list)
    axes: dict[Node, int] = field(default_factory=dict)
    fixed: bool = False

    def channels(self, network: GraphModule) -> int:
        """Return how many channels the stream has in a network."""
        return len(_writer(network, self.writers[0]).weight)


def find_streams(network: GraphModule) -> list[Stream]:
    """Group a network's tensors into streams; return those that may be rescaled."""
    leader: dict[Node, Node] = {node: node for node in network.graph.nodes}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    tensors = [n for n in network.graph.nodes if not n.meta.get("scalar") and n.op != "get_attr"]
    for node in tensors:
        if operator_name(node.target) in HOMOGENEOUS:
            for source in tensor_inputs(node):
                leader[find(source)] = find(node)
    streams = {find(node): Stream() for node in tensors}
    axes = channel_axes(network)
    for node in tensors:
        sources = [streams[find(source)] for source in tensor_inputs(node)]
        _take_part(network, node, streams[find(node)], sources, axes)
    return [s for s in streams.values() if not s.fixed and _consistent(network, s)]


def _take_part(
    network: GraphModule, node: Node, own: Stream, sources: list[Stream], axes: Mapping[Node, int]
) -> None:
    """Note what a node does to its own stream and to those it reads."""
    module = module_of(network, node)
    if node in axes:
        own.axes[node] = axes[node]
    if isinstance(module, (Layer, BatchNorm)):
        own.writers.append(node)
        once = len(calls(network)[str(node.target)]) == 1
        own.fixed |= not once
        if isinstance(module, Layer):
            source = tensor_inputs(node)[0]
            sources[0].readers.append(node)
            sources[0].fixed |= not once or axes.get(source) != input_axis(module, source)
        else:
            sources[0].fixed = True  # its statistics stay those of the training data
    elif operator_name(node.target) in HOMOGENEOUS:
        own.tensors.append(node)
        own.fixed |= _adds_a_constant(node) or node not in axes
    else:
        for stream in (own, *sources):
            stream.fixed = True


def _adds_a_constant(node: Node) -> bool:
    name = operator_name(node.target)
    return name == "aten.add.Tensor" and len(tensor_inputs(node)) != 2


def _consistent(network: GraphModule, stream: Stream) -> bool:
    """Whether every writer has, and every reader expects, the same number of channels."""
    if not stream.writers or not stream.readers or not stream.tensors:
        return False
    written = {len(_writer(network, n).weight) for n in stream.writers}
    read = {_input_channels(_layer(network, n)) for n in stream.readers}
    return len(written | read) == 1


def _writer(network: GraphModule, node: Node) -> Layer | BatchNorm:
    module = module_of(network, node)
    assert isinstance(module, (Layer, BatchNorm))
    return module


def _layer(network: GraphModule, node: Node) -> Layer:
    layer = module_of(network, node)
    assert isinstance(layer, Layer)
    return layer


def _input_channels(layer: Layer) -> int:
    return layer.weight.shape[1] * layer.groups


class _Ranges(Interpreter):
    """Runs a network and keeps each channel's mean square of some tensors, whose channels are on the axes given."""

    def __init__(self, network: GraphModule, axes: Mapping[Node, int]) -> None:
        super().__init__(network)
        self.axes = axes
        self.squares: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n in self.axes:
            dims = [d for d in range(result.ndim) if d != self.axes[n]]
            self.squares[n] = self.squares.get(n, 0) + result.square().mean(dims)
        return result


def equalized(
    teacher: Teacher, images: Tensor | None, strength: float, *, fold: bool = True
) -> Teacher:
    """Return a teacher that computes the same, streams equalized and batch norms folded.

    Args:
        teacher: stays as it is.
        images: (N, C, H, W), normalised; some 128 are plenty. None: channels' sizes are taken from
            the batch norms instead, and streams that they say nothing of stay as they are.
        strength: see `equalize`; 0 only folds.
        fold: or leave the batch norms, whose gamma and beta then take the factors.

    Example:
        >>> from zsq.teacher.teacher import load_teacher
        >>> teacher, x = load_teacher("zsq:resnet20_cifar10"), torch.randn(4, 3, 32, 32)
        >>> torch.allclose(equalized(teacher, x, 0.5)(x), teacher(x), atol=1e-4)
        True
    """
    # one memory format: another one gives ranges, and so weights, that differ in the last bit
    network = fold_batch_norms(teacher.network) if fold else copy.deepcopy(teacher.network)
    network = channels_last(network)
    parameter = next(network.parameters(), None)
    if strength > 0 and parameter is not None:
        if images is None:
            squares = channel_squares(teacher.network)
        else:
            squares = measured_squares(network, images.to(parameter.device).contiguous())
        equalize(network, squares, strength)
    return Teacher(network, teacher.info)


@torch.no_grad()
def measured_squares(network: GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Return each channel's mean square on images, (C,) by node, for the tensors of streams."""
    streams = find_streams(network)
    ranges = _Ranges(network, {n: stream.axes[n] for stream in streams for n in stream.tensors})
    for part in torch.split(images, 64):
        ranges.run(part)
    return {node.name: square for node, square in ranges.squares.items()}


@torch.no_grad()
def equalize(network: GraphModule, squares: Mapping[str, Tensor], strength: float) -> None:
    """Rescale a network's streams in place so that their channels have similar ranges.

    Outputs stay the same up to float rounding.

    Args:
        network: with batch norms or without. What a batch norm reads stays as it is.
        squares: mean square of each channel, (C,) by node; only ratios count. A stream of which a tensor
            is missing stays as it is.
        strength: 1 makes ranges equal; 0.5 leaves half of the difference (in logarithms) to the
            weights that read the stream, as their own rounding suffers from it.
    """
    for stream in find_streams(network):
        if any(n.name not in squares for n in stream.tensors):
            continue
        square = torch.stack([squares[n.name] for n in stream.tensors]).amax(0)
        _rescale(network, stream, _factor(square.sqrt(), strength))


@torch.no_grad()
def rescale(network: GraphModule, factors: Mapping[str, Tensor]) -> None:
    """Multiply the channels of a network's streams, in place; outputs stay the same up to float rounding.

    Args:
        network: with batch norms or without.
        factors: positive, (C,), by the name of the first tensor of a stream; other streams stay as they are.
    """
    for stream in find_streams(network):
        factor = factors.get(stream.tensors[0].name)
        if factor is not None:
            _rescale(network, stream, factor.to(_writer(network, stream.writers[0]).weight.device))


def _rescale(network: GraphModule, stream: Stream, factor: Tensor) -> None:
    for node in stream.writers:
        _scale_outputs(_writer(network, node), factor)
    for node in stream.readers:
        _scale_inputs(_layer(network, node), 1 / factor)


def _factor(size: Tensor, strength: float) -> Tensor:
    largest = size.max().clamp(min=1e-12)
    factor = (largest / size.clamp(min=1e-12)) ** strength
    return factor.clamp(1 / LIMIT, LIMIT)


def _scale_outputs(layer: Layer | BatchNorm, factor: Tensor) -> None:
    layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factor)


def _scale_inputs(layer: Layer, factor: Tensor) -> None:
    groups = layer.groups
    outputs, inputs, *kernel = layer.weight.shape
    shaped = layer.weight.view(groups, outputs // groups, inputs, *kernel)
    shaped.mul_(factor.reshape(groups, 1, inputs, *[1] * len(kernel)))
