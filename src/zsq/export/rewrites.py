# SPDX-License-Identifier: Apache-2.0
"""Rewriting a student's graph into the forms that integer runtimes recognise, values unchanged.

* Averages over the whole map become global average pools.
* The batch size is read off the network's input, or left to -1, never off an inner tensor: one
  reader too many keeps a runtime from fusing a layer with its quantizers.
* A convolution over the whole map (1x1 of a 1x1 map, say) that ends in the logits becomes a linear layer:
  runtimes compute float results from integers for matrix products, but not for convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.export.folding import put_module
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import commutes, origin
from zsq.quantizers.weight import FrozenWeight
from zsq.teacher.fold import calls, module_of, tensor_inputs
from zsq.teacher.layers import operator_name

GLOBAL_POOL = torch.ops.aten.adaptive_avg_pool2d.default
_MEANS = {"aten.mean.dim"}
_RESHAPES = {"aten.reshape.default"}


class Facts(Interpreter):
    """Runs a network once and notes the shape of every tensor, and which hold finite floats.

    Attributes:
        shapes: by node name.
        quantizable: names of nodes whose result is a finite float32 tensor.
    """

    def __init__(self, network: GraphModule, images: Tensor) -> None:
        super().__init__(network)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.quantizable: set[str] = set()
        self.batch = len(images)
        with torch.no_grad():
            self.run(images)

    def run_node(self, n: Node) -> Any:
        """Run one node and note what came out."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
            if result.dtype == torch.float32 and bool(torch.isfinite(result).all()):
                self.quantizable.add(n.name)
        return result


def input_quantizer(
    network: GraphModule, node: Node, operand: int = 0
) -> ActivationQuantizer | None:
    """Return the quantizer whose grid a node's operand lies on, or None if it is float."""
    while operand < len(tensor_inputs(node)):
        node, operand = tensor_inputs(node)[operand], 0
        module = module_of(network, node)
        if isinstance(module, ActivationQuantizer):
            return module
        if not commutes(node):
            return None
    return None


def rewrite(network: GraphModule, facts: Facts) -> None:
    """Apply every rewriting to ``network``, in place.

    Args:
        network: a student's network, quantizers and all.
        facts: of this network.
    """
    for node in list(network.graph.nodes):
        if _is_global_mean(node, facts):
            _to_global_pool(network, node)
    _localise_sizes(network, facts)
    _logits_convolution_to_linear(network, facts)
    network.graph.eliminate_dead_code()
    network.graph.lint()
    network.recompile()


def drop_repeated_quantizers(network: GraphModule, facts: Facts) -> None:
    """Drop slices that take everything, and quantizers right behind themselves, in place."""
    for node in list(network.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            continue
        whole = operator_name(node.target) == "aten.slice.Tensor" and (
            facts.shapes[node.name] == facts.shapes[source.name]
        )
        repeated = (
            isinstance(module_of(network, node), ActivationQuantizer)
            and source.op == "call_module"
            and source.target == node.target
        )
        if whole or repeated:
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
    network.recompile()


def is_global_pool(node: Node) -> bool:
    """Whether a node averages each channel of an image over the whole map, keeping its axes."""
    return node.target is GLOBAL_POOL and list(node.args[1]) in ([1, 1], [1])  # type: ignore[arg-type]


def _is_global_mean(node: Node, facts: Facts) -> bool:
    name, source = operator_name(node.target), node.args[0] if node.args else None
    shape = facts.shapes.get(source.name, ()) if isinstance(source, Node) else ()
    if len(shape) != 4:
        return False
    if name == "aten.avg_pool2d.default":
        kernel = [int(k) for k in node.args[1]]  # type: ignore[arg-type,union-attr]
        padding = node.args[3] if len(node.args) > 3 else [0]
        whole = tuple(kernel * 2 if len(kernel) == 1 else kernel) == shape[2:]
        return whole and not any(padding) and len(node.args) < 5  # type: ignore[arg-type]
    axes = node.args[1] if len(node.args) > 1 else None
    # a mean in another dtype is not a pool
    return name in _MEANS and not node.kwargs and {a % 4 for a in axes or ()} == {2, 3}  # type: ignore[operator,union-attr]


def _to_global_pool(network: GraphModule, node: Node) -> None:
    """Change the node itself, so that it keeps its name; add a flatten where axes were dropped."""
    drops_axes = operator_name(node.target) in _MEANS and not (len(node.args) > 2 and node.args[2])
    node.target, node.args, node.kwargs = GLOBAL_POOL, (node.args[0], [1, 1]), {}
    if not drops_axes:
        return
    anchor = _behind_quantizer(network, node)
    readers = list(anchor.users)
    flat = _flatten(network, anchor)
    for reader in readers:
        reader.replace_input_with(anchor, flat)


def _flatten(network: GraphModule, node: Node) -> Node:
    """Insert a flatten behind ``node``, and ``node``'s quantizer behind that if it is one."""
    with network.graph.inserting_after(node):
        flat = network.graph.call_function(torch.ops.aten.flatten.using_ints, (node, 1))
    if not isinstance(module_of(network, node), ActivationQuantizer):
        return flat
    with network.graph.inserting_after(flat):
        return network.graph.call_module(str(node.target), (flat,))


def _behind_quantizer(network: GraphModule, node: Node) -> Node:
    """Return the quantizer that alone reads ``node``, else ``node`` itself."""
    readers = list(node.users)
    alone = len(readers) == 1 and isinstance(module_of(network, readers[0]), ActivationQuantizer)
    return readers[0] if alone else node


def _localise_sizes(network: GraphModule, facts: Facts) -> None:
    image = next(n for n in network.graph.nodes if n.op == "placeholder")
    for node in list(network.graph.nodes):
        if operator_name(node.target) == "aten.sym_size.int" and node.args[1] == 0:
            source = node.args[0]
            if isinstance(source, Node) and facts.shapes.get(source.name, (0,))[0] == facts.batch:
                node.replace_input_with(source, image)
    for node in network.graph.nodes:
        if operator_name(node.target) in _RESHAPES:
            node.args = (node.args[0], _free_batch(node, image, facts))


def _free_batch(node: Node, image: Node, facts: Facts) -> Any:
    """Return a reshape's target with -1 for the batch size and known numbers for the rest."""
    target: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shape = facts.shapes[node.name]
    leads = bool(target) and (
        (isinstance(target[0], Node) and target[0].args == (image, 0))
        or (target[0] == -1 and shape[0] == facts.batch)
    )
    return (
        [-1, *shape[1:]] if leads and not any(isinstance(t, Node) for t in target[1:]) else target
    )


def _logits_convolution_to_linear(network: GraphModule, facts: Facts) -> None:
    output = next(n for n in network.graph.nodes if n.op == "output")
    node = origin(output.all_input_nodes[0])
    layer = module_of(network, node)
    source = node.args[0] if node.args else None
    if not isinstance(layer, QuantizedLayer) or not isinstance(source, Node):
        return
    weight, path = layer.frozen, str(node.target)
    if weight.integers.ndim == 2:  # linear already
        return
    # a kernel as large as the map, in one group
    whole = facts.shapes[source.name][1:] == tuple(weight.integers.shape[1:])
    single = set(facts.shapes[node.name][2:]) == {1}
    if not (whole and single) or _is_padded(layer) or len(calls(network)[path]) > 1:
        return
    flat_weight = FrozenWeight(
        weight.integers.flatten(1), weight.scale, weight.zero_point, weight.bits
    )
    put_module(network, path, QuantizedLayer("aten.linear.default", (), flat_weight, layer.bias))
    shape = [-1, *facts.shapes[node.name][1:]]
    readers = list(node.users)
    node.replace_input_with(source, _flatten(network, source))
    with network.graph.inserting_after(node):
        restored = network.graph.call_function(torch.ops.aten.reshape.default, (node, shape))
    for reader in readers:
        reader.replace_input_with(node, restored)


def _is_padded(layer: QuantizedLayer) -> bool:
    padding = layer.arguments[1] if len(layer.arguments) > 1 else 0
    if isinstance(padding, str):
        return padding != "valid" and set(layer.frozen.integers.shape[2:]) != {1}
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)
