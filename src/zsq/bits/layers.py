# SPDX-License-Identifier: Apache-2.0
"""What is known of a network before bits are chosen: what its layers cost, and which bits are free."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule

from zsq.bits.costs import LayerFacts
from zsq.config import Recipe
from zsq.quantizers.protocol import Placement, origin, place
from zsq.settings import Bits, Override
from zsq.student import prepared_network
from zsq.teacher.fold import calls, tensor_inputs
from zsq.teacher.inspect import count_macs
from zsq.teacher.layers import Layer
from zsq.teacher.teacher import Teacher


def fixed_bits(
    network: GraphModule, protocol: str, overrides: Iterable[Override] = ()
) -> dict[str, int]:
    """Return the bits of the layers that a protocol and overrides fix, by path; the others are free.

    Args:
        network: as the recipe quantizes it, see `zsq.student.prepared_network`.
        protocol: one of `zsq.quantizers.protocol.PROTOCOLS`.
        overrides: those of the recipe; none to ask about the protocol alone.

    Raises:
        UsageError: unknown protocol, no layer to quantize, or an override that matches nothing.
    """
    low, high = _placed_apart(network, protocol, overrides)
    return {path: bits for path, bits in low.weights.items() if high.weights[path] == bits}


def free_edges(
    network: GraphModule, protocol: str, overrides: Iterable[Override] = ()
) -> list[str]:
    """Return the tensors whose bits protocol and overrides leave free, by the node that produces them.

    Arguments and errors are those of `fixed_bits`.
    """
    low, high = _placed_apart(network, protocol, overrides)
    return [name for name, bits in low.activations.items() if high.activations[name] != bits]


def _placed_apart(
    network: GraphModule, protocol: str, overrides: Iterable[Override]
) -> tuple[Placement, Placement]:
    """Place few bits and many: what is free follows the recipe's."""
    chosen = tuple(overrides)
    few, many = Bits(weights=2, activations=2), Bits(weights=7, activations=7)
    return place(network, protocol, few, chosen), place(network, protocol, many, chosen)


def layer_facts(teacher: Teacher, recipe: Recipe) -> tuple[dict[str, LayerFacts], list[str]]:
    """Return what each layer's cost depends on, and the layers whose bits the recipe leaves free.

    Args:
        teacher: whose layers; stays as it is.
        recipe: its protocol and its overrides fix layers; its bits are those of activations.

    Returns:
        {path: facts} of every layer in execution order, and the paths of the free ones.

    Raises:
        UsageError: no layer to quantize, or an override that matches nothing.
    """
    network = prepared_network(teacher, recipe)
    activations = place(network, recipe.protocol, recipe.bits, recipe.overrides).activations
    fixed = fixed_bits(network, recipe.protocol, recipe.overrides)
    macs, facts = count_macs(network, teacher.info.input_shape), {}
    for path, nodes in calls(network).items():
        layer = network.get_submodule(path)
        if isinstance(layer, Layer):
            bits = activations.get(origin(tensor_inputs(nodes[0])[0]).name, 32)
            facts[path] = LayerFacts(
                layer.weight.numel(), macs.get(path, 0), bits, depthwise=layer.is_depthwise
            )
    return facts, [path for path in facts if path not in fixed]
