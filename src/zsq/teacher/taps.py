# SPDX-License-Identifier: Apache-2.0
"""Reading what flows into a network's batch norms, without hooks.

A *tapped* network is a copy of the graph that returns the inputs of its batch norms instead of the
logits; whatever the last batch norm does not need is not computed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from zsq.errors import UsageError
from zsq.functional.shift import Shift
from zsq.teacher.fold import module_of, tensor_inputs
from zsq.teacher.layers import BatchNorm, Layer

#: Added to the stored variance before the root, as in the published code (the layer's own is 1e-5).
TARGET_EPS = 1e-6


@dataclass(frozen=True)
class StatisticsTarget:
    """Stored statistics of one batch norm: mean, standard deviation, variance; (C,), float32."""

    path: str
    mean: Tensor
    std: Tensor
    variance: Tensor


def batch_norm_nodes(network: GraphModule) -> list[Node]:
    """Return the nodes that call a batch norm with stored statistics, in execution order."""
    return [n for n in network.graph.nodes if isinstance(module_of(network, n), BatchNorm)]


def tap_batch_norms(
    network: GraphModule, *, swing: bool = False, logits: bool = False, features: bool = False
) -> tuple[GraphModule, list[StatisticsTarget]]:
    """Build the tapped copy of a network.

    Args:
        network: batch norms not folded.
        swing: put a `Shift` before every convolution whose stride is not 1 (GENIE's swing
            convolution, arXiv 2212.04780, section 4.1). The copy then takes, after the images, an
            integer tensor of offsets, (shifts, 2) or, for batches side by side, (shifts, batches, 2)
            (`zsq.functional.shift.random_offsets`).
        logits: return the pair (logits, batch norm inputs) from one pass.
        features: return (logits, what the classifier reads, batch norm inputs).

    Returns:
        The tapped network, whose output is the list of batch norm inputs, and their targets.

    Raises:
        UsageError: no batch norm has stored statistics, or no single layer computes the logits.
    """
    tapped = copy.deepcopy(network)
    taps = batch_norm_nodes(tapped)
    if not taps:
        raise UsageError(
            "the network has no batch norm with running statistics (track_running_stats=True), "
            "which is what images are synthesised from. `zsq quantize ... --images FOLDER` takes real ones "
            "instead."
        )
    if swing:
        _insert_shifts(tapped)
    output = next(n for n in tapped.graph.nodes if n.op == "output")
    inputs = tuple(n.args[0] for n in taps)
    wanted: list[Node] = [output.all_input_nodes[0]] if logits or features else []
    if features:
        wanted.append(tensor_inputs(classifier_node(tapped))[0])
    output.args = ((*wanted, inputs),) if wanted else (inputs,)
    tapped.graph.eliminate_dead_code()
    targets = [_target(tapped, node) for node in taps]
    tapped.delete_all_unused_submodules()
    tapped.graph.lint()
    tapped.recompile()
    return tapped.eval().requires_grad_(False), targets


def classifier_node(network: GraphModule) -> Node:
    """Return the node of the layer that computes a network's logits.

    It is found from the output backwards, through operators of one operand (pooling, activation,
    flatten): what classifies may be a linear layer or a convolution.

    Raises:
        UsageError: the logits are not one layer's outputs.
    """
    output = next(n for n in network.graph.nodes if n.op == "output")
    node: Node = output.all_input_nodes[0]
    while not isinstance(module_of(network, node), Layer):
        operands = tensor_inputs(node)
        if len(operands) != 1:
            raise UsageError(
                f"the network's logits come from {node.name!r}, which has {len(operands)} operands "
                "where a single classifier layer was expected. Do without its rows (Qimera: --set "
                "synthesis.embedding=random --set synthesis.latent=64) or its features (IntraQ: --set "
                "synthesis.losses.class_band=0), or without the part of mixed images that reads them."
            )
        node = operands[0]
    return node


def _target(network: GraphModule, node: Node) -> StatisticsTarget:
    module = module_of(network, node)
    assert isinstance(module, BatchNorm)
    mean, variance = module.running_mean.float(), module.running_var.float()
    std = torch.sqrt(variance + TARGET_EPS)
    return StatisticsTarget(str(node.target), mean.clone(), std, variance.clone())


def strided_nodes(network: GraphModule) -> list[Node]:
    """Return the nodes of 2-D convolutions whose stride is not 1 in some direction."""
    found = []
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, Layer) and module.weight.ndim == 4 and max(module.stride) > 1:
            found.append(node)
    return found


def _insert_shifts(network: GraphModule) -> None:
    graph = network.graph
    strided = strided_nodes(network)
    images = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_after(images):
        offsets = graph.placeholder("offsets")
    network.add_module("shifts", nn.Module())
    for index, node in enumerate(strided):
        network.shifts.add_module(str(index), Shift())  # type: ignore[union-attr]
        with graph.inserting_before(node):
            offset = graph.call_function(torch.select, (offsets, 0, index))
            shifted = graph.call_module(f"shifts.{index}", (node.args[0], offset))
        node.replace_input_with(node.args[0], shifted)  # type: ignore[arg-type]
