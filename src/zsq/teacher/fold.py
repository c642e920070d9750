# SPDX-License-Identifier: Apache-2.0
"""Which batch norm follows which layer, by the graph, and folding one into the other."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from zsq.teacher.layers import BatchNorm, Layer
from zsq.teacher.shapes import last_axis


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that alone reads it.

    Attributes:
        layer: module path of the convolution or linear layer.
        batch_norm: module path of the batch norm.
    """

    layer: str
    batch_norm: str


def module_of(network: GraphModule, node: Node) -> nn.Module | None:
    """Return the module that a ``call_module`` node calls, else None."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def tensor_inputs(node: Node) -> list[Node]:
    """Return the tensor operands of a node (neither sizes nor constants)."""
    return [n for n in node.all_input_nodes if not n.meta.get("scalar") and n.op != "get_attr"]


def calls(network: GraphModule) -> dict[str, list[Node]]:
    """Map each module path to the nodes that call it, in execution order."""
    found: dict[str, list[Node]] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


def find_pairs(network: GraphModule) -> list[Pair]:
    """Find the batch norms that can be folded.

    A batch norm folds into the layer before it when the layer has no other reader and is called
    once: definition order is no guide (it gives wrong pairs in one network of four). A linear layer on
    tokens or maps has its channels on the last axis, the batch norm after it on the second; they stay apart.

    Args:
        network: from `zsq.teacher.graph.build_network`.

    Returns:
        The pairs in execution order.
    """
    count = {path: len(nodes) for path, nodes in calls(network).items()}
    pairs = []
    for node in network.graph.nodes:
        if not isinstance(module_of(network, node), BatchNorm) or count[str(node.target)] != 1:
            continue
        source = node.args[0]
        layer = module_of(network, source)
        if (
            isinstance(layer, Layer)
            and not (layer.is_linear and last_axis(source) > 1)
            and len(source.users) == 1
            and count[str(source.target)] == 1
        ):
            pairs.append(Pair(str(source.target), str(node.target)))
    return pairs


@torch.no_grad()
def fold_layer(layer: Layer, batch_norm: BatchNorm) -> None:
    """Change ``layer`` in place so that it also does what ``batch_norm`` does after it.

    ``w'[c] = w[c] * g[c]`` and ``b'[c] = b[c] * g[c] + h[c]`` with ``g, h`` the batch norm's affine
    map; a negative gamma only flips the channel's sign. Computed in float64.
    """
    scale, shift = (t.double() for t in _scale_and_shift(batch_norm))
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=layer.weight.requires_grad)


def _scale_and_shift(batch_norm: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    exact = copy.deepcopy(batch_norm).double()
    return exact.scale_and_shift()


def fold_batch_norms(network: GraphModule) -> GraphModule:
    """Return a copy of ``network`` with every foldable batch norm folded away.

    The outputs are unchanged up to float rounding; batch norms that follow an addition, a
    concatenation or a shared layer stay where they are.
    """
    folded = copy.deepcopy(network)
    sites = calls(folded)
    for pair in find_pairs(folded):
        layer, batch_norm = folded.get_submodule(pair.layer), folded.get_submodule(pair.batch_norm)
        assert isinstance(layer, Layer)
        assert isinstance(batch_norm, BatchNorm)
        fold_layer(layer, batch_norm)
        node = sites[pair.batch_norm][0]
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        folded.graph.erase_node(node)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded
