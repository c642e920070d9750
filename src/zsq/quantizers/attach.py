# SPDX-License-Identifier: Apache-2.0
"""From a teacher and a placement to a student: the same graph with quantizers on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from zsq.functional.ranges import RangeRule, range_grid
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import Placement
from zsq.teacher.layers import Layer

#: Elements of an activation tensor that the search for its first step looks at.
SAMPLE = 1 << 18


def quantizer_path(node_name: str) -> str:
    """Return the module path of the quantizer on a node's result."""
    return f"quantizers.{node_name}"


def insert_quantizers(
    network: GraphModule, placement: Placement, make: Callable[[int], ActivationQuantizer]
) -> None:
    """Put activation quantizers on the graph, in place.

    A quantizer stands right behind the node that produces a tensor and all its readers read the
    quantized one.

    Args:
        network: the student's network.
        placement: what to quantize.
        make: builds a quantizer of the given number of bits.
    """
    nodes = {n.name: n for n in network.graph.nodes}
    if not hasattr(network, "quantizers"):
        network.add_module("quantizers", nn.Module())
    for name, bits in placement.activations.items():
        if name not in network.quantizers._modules:  # type: ignore[union-attr]
            network.quantizers.add_module(name, make(bits))  # type: ignore[union-attr]
        _insert_behind(network, nodes[name], quantizer_path(name))
    for name, owner in placement.shared.items():
        _insert_behind(network, nodes[name], quantizer_path(owner))
    network.graph.lint()
    network.recompile()


def _insert_behind(network: GraphModule, node: Node, path: str) -> None:
    readers = list(node.users)
    if any(reader.op == "call_module" and str(reader.target) == path for reader in readers):
        return
    with network.graph.inserting_after(node):
        created = network.graph.call_module(path, (node,))
    created.meta["path"] = path
    for reader in readers:
        if not reader.meta.get("scalar"):
            reader.replace_input_with(node, created)


def quantize_layers(
    network: GraphModule, placement: Placement, make: Callable[[Layer, int], nn.Module]
) -> None:
    """Replace every layer by its quantized form, in place.

    Args:
        network: the student's network.
        placement: bits per layer.
        make: builds the weight quantizer of a layer for a number of bits.
    """
    for path, bits in placement.weights.items():
        layer = network.get_submodule(path)
        assert isinstance(layer, Layer)
        replacement = QuantizedLayer.of(layer, make(layer, bits))
        for name, child in layer.named_children():  # modules nested below a layer's path
            replacement.add_module(name, child)
        parent, _, last = path.rpartition(".")
        network.get_submodule(parent).add_module(last, replacement)


def copy_network(network: GraphModule) -> GraphModule:
    """Return an independent copy: modules, graph and all."""
    return copy.deepcopy(network)


class _Recorder(Interpreter):
    """Runs a network and keeps a sample of the tensors named."""

    def __init__(self, network: GraphModule, wanted: set[str]) -> None:
        super().__init__(network)
        self.wanted = wanted
        self.samples: dict[str, list[Tensor]] = {name: [] for name in wanted}
        self.room = SAMPLE

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.samples[n.name].append(_sample(result, self.room))
        return result


def _sample(x: Tensor, room: int) -> Tensor:
    """Return about ``room`` elements of ``x``, its extremes among them."""
    flat = x.detach().flatten().float()
    stride = max(1, flat.numel() // room)
    extremes = torch.stack([flat.min(), flat.max()])
    # else some channels, rows or columns alone would be looked at: 49 steps through maps of 7 x 7 see a corner
    while any(math.gcd(stride, side) > 1 for side in x.shape[1:]):
        stride += 1
    return torch.cat([flat[::stride], extremes])


@torch.no_grad()
def calibrate(
    network: GraphModule, names: dict[str, ActivationQuantizer], batches: list[Tensor], *,
    power: float = 2.4, asymmetric: bool = True, rule: RangeRule = "error", percentile: float = 99.99,
) -> None:  # fmt: skip
    """Choose the first step of activation quantizers from data.

    Args:
        network: computes the tensors, in whatever state its other quantizers are.
        names: quantizers by the name of the node whose result they quantize.
        batches: network inputs.
        power: exponent of the error that the search minimises.
        asymmetric: allow off-centre zero points for two-sided data.
        rule: how a range is chosen, see `range_grid`.
        percentile: per cent of the values that rule ``percentile`` keeps at either end.
    """
    recorder = _Recorder(network, set(names))
    recorder.room = max(SAMPLE // max(len(batches), 1), 1024)
    for batch in batches:
        recorder.run(batch)
    for name, quantizer in names.items():
        sample = torch.cat(recorder.samples[name])
        grid = range_grid(
            sample, quantizer.bits, rule, power=power, asymmetric=asymmetric, percentile=percentile
        )
        quantizer.set_grid(grid)
