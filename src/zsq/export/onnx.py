# SPDX-License-Identifier: Apache-2.0
"""Writing ONNX files: integer students as quantize/dequantize graphs, float networks as they are."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.fx import GraphModule

from zsq.errors import RunError
from zsq.export.naming import name_nodes
from zsq.export.operators import (
    DeployedLayer,
    DeployedQuantizer,
    Translations,
    global_average_pool,
    stored_bits,
    translations,
)
from zsq.export.rewrites import (
    Facts,
    drop_repeated_quantizers,
    input_quantizer,
    is_global_pool,
)
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import copy_network
from zsq.quantizers.layers import QuantizedLayer
from zsq.runtime.environment import version
from zsq.runtime.files import atomic_write
from zsq.student import Student
from zsq.teacher.fold import module_of

#: The first that has 4-bit integers in QuantizeLinear and DequantizeLinear.
OPSET = 21
INPUT, LOGITS = "input", "logits"


def write_integer(student: Student, path: Path | str) -> None:
    """Write an integer student as an ONNX file that stock runtimes run in integers.

    Activations are uint8: QuantizeLinear, an integer Clip where fewer codes than 256 may occur, and
    DequantizeLinear. Weights of up to 4 bits are INT4 initialisers cast to int8, wider ones and those
    of depthwise layers int8, with a scale and a zero point per output channel. Biases are int32 on the
    accumulator's grid. The batch size is free.

    Args:
        student: from `zsq.export.deploy.to_integer`.
        path: the file; written atomically.

    Raises:
        RunError: the exporter cannot express the network, or lost a quantizer on the way.
    """
    network = deployed_network(student)
    program = _export(network, student.info.input_shape, translations())
    _check_quantizers(network, program.model)
    narrow = {
        f"{path}.weight_quantized" for path, layer in student.layers().items()
        if stored_bits(layer.bits, depthwise=layer.is_depthwise) == 4
    }  # fmt: skip
    name_nodes(program.model.graph)
    _store_as_int4(program.model, narrow)
    program.model.metadata_props.update(_properties(student))
    _save(program.model, path)


def export_float(network: GraphModule, path: Path | str, input_shape: tuple[int, ...]) -> None:
    """Write a float network, batch norms folded, as the ONNX file to compare with.

    Args:
        network: from `zsq.teacher.fold.fold_batch_norms`.
        path: the file; written atomically.
        input_shape: (C, H, W).

    Raises:
        RunError: the exporter cannot express the network.
    """
    _save(_export(copy_network(network).cpu(), input_shape, {}).model, path)


def deployed_network(student: Student) -> GraphModule:
    """Return the network that is handed to the exporter: integer constants and opaque operators."""
    network = copy_network(student.network)
    facts = Facts(network, torch.zeros(2, *student.info.input_shape))
    drop_repeated_quantizers(network, facts)
    requantized = _requantized(network)
    replaced: dict[str, nn.Module] = {}
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, ActivationQuantizer):
            path = str(node.target)
            replaced[path] = DeployedQuantizer(module, clip=path in requantized)
        elif isinstance(module, QuantizedLayer):
            grid = input_quantizer(network, node)
            matrix = len(facts.shapes[node.name]) == 2
            scale = None if grid is None else grid.scale
            replaced[str(node.target)] = DeployedLayer(module, scale, matrix=matrix)
        elif is_global_pool(node):
            node.target, node.args = global_average_pool._opoverload, (node.args[0],)
    for path, module in sorted(replaced.items()):
        parent, _, last = path.rpartition(".")
        old = network.get_submodule(path)
        for name, child in old.named_children():
            if name != "weight" or not isinstance(old, QuantizedLayer):
                module.add_module(name, child)
        network.get_submodule(parent).add_module(last, module)
    network.recompile()
    return network


def _requantized(network: GraphModule) -> set[str]:
    """Return the paths of quantizers that read what lies on another quantizer's grid.

    ONNX Runtime merges such a pair into one quantizer on a grid of its own making, which changes
    values and keeps the layer behind from running in integers; a Clip in between prevents it.
    """
    found = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, ActivationQuantizer):
            source = input_quantizer(network, node)
            if source is not None and source is not module:
                found.add(str(node.target))
    return found


def _export(
    network: GraphModule, input_shape: tuple[int, ...], table: Translations
) -> torch.onnx.ONNXProgram:
    images = torch.zeros(2, *input_shape)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network, (images,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[INPUT], output_names=[LOGITS], dynamic_shapes=({0: "batch"},),
                custom_translation_table=table,
            )  # fmt: skip
    except Exception as error:
        cause = error.__cause__ or error
        reason = next(
            (line for line in str(cause).splitlines() if line.strip()), type(cause).__name__
        )
        raise RunError(
            f"torch.onnx.export cannot express this network: {reason.strip()[:300]}. The quantized network "
            "itself is fine (zsq.load runs it); replace the operator named here to get an ONNX file."
        ) from error
    assert program is not None
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_quantizers(network: GraphModule, model: ir.Model) -> None:
    """Check that every quantizer of the network arrived in the file.

    The exporter may merge nodes that compute the same from the same, so that a grid or a parameter
    that is used twice may stand in the file once.
    """
    modules = [module_of(network, node) for node in network.graph.nodes]
    quantizers = [m for m in modules if isinstance(m, DeployedQuantizer)]
    parameters = [p for m in modules if isinstance(m, DeployedLayer) for p in m.parameter_keys()]
    grids = {m.key() for m in quantizers}
    expected = {
        "QuantizeLinear": (len(grids), len(quantizers)),
        "DequantizeLinear": (
            len(grids) + len(set(parameters)), len(quantizers) + len(parameters),
        ),
    }  # fmt: skip
    for operator, (least, most) in expected.items():
        found = sum(node.op_type == operator for node in model.graph)
        if not least <= found <= most:
            raise RunError(
                f"the exported graph holds {found} {operator} nodes where the student has {most}; this "
                f"PyTorch ({torch.__version__}) optimised quantizers away. Please report it with the network."
            )


def _store_as_int4(model: ir.Model, names: set[str]) -> None:
    """Store weights of up to 4 bits in half a byte each, cast to int8 for the runtime.

    Runtimes fold the cast when they load the file; INT4 straight into DequantizeLinear is dequantized
    to float on every run instead.
    """
    graph = model.graph
    for name in sorted(names & set(graph.initializers)):
        value = graph.initializers[name]
        assert value.const_value is not None
        codes = value.const_value.numpy()
        readers = list(value.uses())
        half = ir.Value(
            name=f"{name}_int4", shape=value.shape, type=ir.TensorType(ir.DataType.INT4)
        )
        half.const_value = ir.tensor(codes, dtype=ir.DataType.INT4, name=half.name)
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.INT8)}, name=f"{name}_Cast")
        graph.initializers.pop(name)
        graph.register_initializer(half)
        cast.outputs[0].name, value.name = name, f"{name}_replaced"
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.INT8), value.shape
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _properties(student: Student) -> dict[str, str]:
    """What a reader of the file needs to feed it and to know where it came from."""
    info = student.info
    facts = {
        "protocol": student.placement.protocol,
        "bits": str(student.recipe.bits),
        "recipe": student.recipe.name,
        "reference": info.reference,
        "input_shape": list(info.input_shape),
        "mean": info.mean,
        "std": info.std,
        "resize": info.resize,
        "interpolation": info.interpolation,
    }
    properties = {f"zsq.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    return {"zsq.version": version("zsq"), **properties}


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what exporters note for debugging: half of a small file. Runtimes infer the shapes."""
    graph = proto.graph
    del graph.value_info[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


def _save(model: ir.Model, path: Path | str) -> None:
    model.producer_name, model.producer_version = "zsq", version("zsq")
    _forget_exporter(model.graph)
    proto = ir.to_proto(model)
    _strip(proto)
    onnx.checker.check_model(proto, full_check=False)
    with atomic_write(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())


def _forget_exporter(graph: ir.Graph) -> None:
    """Drop what the exporter notes about itself: stack traces and file names of this machine."""
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
