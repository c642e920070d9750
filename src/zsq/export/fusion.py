# SPDX-License-Identifier: Apache-2.0
"""Which layers of a file a runtime computes in integers, read off the graph that it will execute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx

_INTEGER_CONVS = frozenset({"QLinearConv", "ConvInteger"})
_FLOAT_CONVS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"})
_INTEGER_MATMULS = frozenset({
    "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
})  # fmt: skip
_FLOAT_MATMULS = frozenset({"Gemm", "MatMul", "FusedGemm", "FusedMatMul"})


@dataclass(frozen=True)
class Fusion:
    """What became of a file's layers.

    Attributes:
        fused_convs: convolutions that run in integers.
        convs: convolutions in the file.
        fused_matmuls: matrix products that run in integers.
        matmuls: matrix products in the file.
        unfused: the layers that run in float, each with the likely reason.
    """

    fused_convs: int
    convs: int
    fused_matmuls: int
    matmuls: int
    unfused: tuple[str, ...]


def read_fusion(written: onnx.ModelProto, optimized: onnx.ModelProto) -> Fusion:
    """Compare a file with what ONNX Runtime made of it.

    Args:
        written: the exported model.
        optimized: the model that the runtime saved after optimising it.
    """
    before = Counter(node.op_type for node in written.graph.node)
    after = Counter(node.op_type for node in optimized.graph.node)
    kept = {
        name for node in optimized.graph.node if node.op_type in _FLOAT_CONVS | _FLOAT_MATMULS
        for name in (node.name, *node.output)
    }  # fmt: skip
    layers = [n for n in written.graph.node if n.op_type in _FLOAT_CONVS | _FLOAT_MATMULS]
    unfused = [n for n in layers if n.name in kept or n.output[0] in kept]
    return Fusion(
        fused_convs=_count(after, _INTEGER_CONVS), convs=_count(before, _FLOAT_CONVS),
        fused_matmuls=_count(after, _INTEGER_MATMULS), matmuls=_count(before, _FLOAT_MATMULS),
        unfused=tuple(f"{n.name or n.output[0]}: {_likely_reason(written.graph, n)}" for n in unfused),
    )  # fmt: skip


def _count(found: Counter[str], names: frozenset[str]) -> int:
    return sum(found[name] for name in names)


def _likely_reason(graph: onnx.GraphProto, layer: onnx.NodeProto) -> str:
    """Say which of the conditions for an integer kernel a layer misses."""
    if layer.op_type == "ConvTranspose":
        return "zsq does not quantize transposed convolutions"
    producers = {name: node.op_type for node in graph.node for name in node.output}
    readers = [node for node in graph.node if layer.output[0] in node.input]
    for name, index in (("input", 0), ("weight", 1)):
        kind = producers.get(layer.input[index])
        if kind != "DequantizeLinear":
            return f"its {name} comes from {kind or 'outside the graph'}, not from a quantizer"
    if any(output.name == layer.output[0] for output in graph.output):
        return "its result is an output of the network, which stays float"
    if [node.op_type for node in readers] != ["QuantizeLinear"]:
        kinds = ", ".join(sorted({node.op_type for node in readers})) or "nothing"
        return f"its result is read by {kinds}, not by one quantizer alone"
    if len(layer.input) > 2 and producers.get(layer.input[2]) not in {None, "DequantizeLinear"}:
        return "its bias is computed in the graph"
    return "this version of ONNX Runtime has no integer kernel for its settings"
