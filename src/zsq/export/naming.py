# SPDX-License-Identifier: Apache-2.0
"""Names in exported files: layers by their path, tensors as onnxruntime.quantization names them.

``<tensor>_quantized``, ``_scale``, ``_zero_point``, ``_QuantizeLinear``, ``_DequantizeLinear``: tools that
compare a quantized file with another look tensors up by these names.
"""

from __future__ import annotations

import re

import onnx_ir as ir

_QUANTIZERS = "quantizers."
#: A user's layer may be called "quantizers" too: its parameters have longer names.
_GRID = re.compile(r"quantizers\.([^.]+)\.(scale|zero_point)")


def name_nodes(graph: ir.Graph) -> None:
    """Rename the nodes and values of an exported graph, in place.

    Args:
        graph: initialisers carry the names of the deployed network's buffers.
    """
    names = _Names(graph)
    for node in graph:
        if node.op_type == "QuantizeLinear":
            _name_activation(node, names)
        elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            _name_parameter(node, node.inputs[0], names)
    for node in graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type in {"Conv", "Gemm", "MatMul"} and weight is not None and weight.name:
            node.name = names.free(weight.name.partition(".weight_DequantizeLinear_Output")[0])
    for value in list(graph.initializers.values()):
        _name_initializer(graph, value, names)


class _Names:
    """Hands out names that nothing else has."""

    def __init__(self, graph: ir.Graph) -> None:
        kept = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        self.used = {value.name or "" for value in kept}
        outputs = {id(value) for value in graph.outputs}
        for number, node in enumerate(graph):  # the exporter's own names make room
            node.name = f"node_{number}_{node.op_type}"
            for index, value in enumerate(node.outputs):
                if id(value) not in outputs and value.name not in self.used:
                    value.name = f"value_{number}_{index}"

    def free(self, wanted: str) -> str:
        """Return ``wanted``, or the first of ``wanted_reused1``, ... that is free."""
        name, number = wanted, 0
        while name in self.used:
            number += 1
            name = f"{wanted}_reused{number}"
        self.used.add(name)
        return name


def _name_activation(quantize: ir.Node, names: _Names) -> None:
    scale = quantize.inputs[1]
    assert scale is not None
    assert scale.name is not None
    tensor = names.free(scale.name.removeprefix(_QUANTIZERS).removesuffix(".scale"))
    source = quantize.inputs[0]
    if source is not None and source.producer() is not None:
        source.name = tensor
    node: ir.Node | None = quantize
    while node is not None:
        node.name = names.free(f"{tensor}_{node.op_type}")
        node.outputs[0].name = names.free(f"{tensor}_{node.op_type}_Output")
        node = (
            None if node.op_type == "DequantizeLinear" else next(iter(node.outputs[0].uses())).node
        )


def _name_parameter(dequantize: ir.Node, codes: ir.Value, names: _Names) -> None:
    if codes.name and codes.name.endswith("_quantized"):
        tensor = codes.name.removesuffix("_quantized")
        dequantize.name = names.free(f"{tensor}_DequantizeLinear")
        dequantize.outputs[0].name = names.free(f"{tensor}_DequantizeLinear_Output")


def _name_initializer(graph: ir.Graph, value: ir.Value, names: _Names) -> None:
    found = _GRID.fullmatch(value.name or "")
    if found:
        graph.initializers.pop(found[0])
        value.name = names.free(f"{found[1]}_{found[2]}")
        if value.const_value is not None:
            value.const_value.name = value.name
        graph.register_initializer(value)
