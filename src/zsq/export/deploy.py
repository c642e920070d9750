# SPDX-License-Identifier: Apache-2.0
"""From a frozen student of any protocol to one whose every edge is an integer grid.

This is the form that runs fast: a runtime keeps a layer in integers only if its input, its output
and both operands of the addition behind it are quantized. What the student's own protocol left
float gets 8 bits, calibrated on images; everything it decided stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.errors import UsageError
from zsq.export.folding import batch_norms_to_layers, fold_batch_norms, fold_clamps
from zsq.export.rewrites import Facts, input_quantizer, is_global_pool, rewrite
from zsq.functional.affine import SMALLEST_SCALE, Grid, per_channel, quant_max
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.attach import calibrate, copy_network, insert_quantizers
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import Placement, extend_to_integer
from zsq.quantizers.weight import FrozenWeight
from zsq.student import Student
from zsq.teacher.fold import calls, module_of

#: Largest bias, in steps of the accumulator: half of what 32 bits hold, so that sums fit as well.
LARGEST_BIAS = 2**30
#: Steps of its output by which one step of one pixel may move a global average.
LARGEST_POOL_STEP = 128
#: Images that the structure of the network is read with; an odd batch tells it from other sizes.
_PROBE = 3
_BATCH = 128


@torch.no_grad()
def to_integer(student: Student, images: Tensor) -> Student:
    """Return a copy of ``student`` under the protocol ``integer``, as it will be shipped.

    Batch norms that are left are folded (exactly; those that no layer precedes become depthwise
    convolutions), edges that the student's protocol left float are quantized to 8 bits, activation
    functions that clip move into the code range of the quantizer behind them, and biases are rounded
    to the accumulator's grid. A student that is ``integer`` already keeps every number, apart from
    8-bit weights of depthwise layers, which get one zero point for all channels.

    Args:
        student: calibrated; frozen here if it was not. Stays as it is.
        images: (N, C, H, W), normalised; calibrate the new quantizers. Synthetic ones will do.

    Returns:
        The integer student, on the CPU.

    Raises:
        UsageError: the student has quantizers without a step, or ``images`` have the wrong shape.
    """
    _check(student, images)
    integer = student.copy().cpu().freeze()
    images = images.cpu()
    network = integer.network
    fold_batch_norms(network)
    rewrite(network, Facts(network, _probe(images)))
    facts = Facts(network, _probe(images))
    if student.placement.protocol != "integer":
        integer.placement = _extend(integer, facts, images)
    extra = batch_norms_to_layers(
        network, {name: len(shape) for name, shape in facts.shapes.items()}
    )
    fold_clamps(network)
    extra |= _separate_shared_layers(network)
    _coarsen_pools(network, Facts(network, _probe(images)))
    _center_depthwise(network)
    weights = {**integer.placement.weights, **extra}
    integer.placement = Placement(
        "integer", weights, integer.placement.activations, integer.placement.shared
    )
    _snap_biases(network)
    return integer.requires_grad_(False).eval()


def _check(student: Student, images: Tensor) -> None:
    expected = tuple(student.info.input_shape)
    if tuple(images.shape[1:]) != expected or not len(images):
        raise UsageError(
            f"the images have shape {tuple(images.shape)} but the network takes (N, {', '.join(map(str, expected))}); "
            "pass images made for this network."
        )
    missing = [name for name, q in student.quantizers().items() if not bool(q.calibrated)]
    if missing:
        raise UsageError(
            f"{len(missing)} activation quantizers of the student have no step yet (the first: {missing[0]!r}); "
            "tune or calibrate the student before exporting it."
        )


def _probe(images: Tensor) -> Tensor:
    return images[torch.arange(_PROBE) % len(images)]


def clean_network(network: GraphModule) -> GraphModule:
    """Return a copy of a student's network without its activation quantizers."""
    clean = copy_network(network)
    for node in list(clean.graph.nodes):
        if isinstance(module_of(clean, node), ActivationQuantizer):
            node.replace_all_uses_with(node.args[0])
            clean.graph.erase_node(node)
    clean.recompile()
    return clean


def _extend(integer: Student, facts: Facts, images: Tensor) -> Placement:
    """Quantize the edges that are still float, and return what is quantized now."""
    clean = clean_network(integer.network)
    wanted = extend_to_integer(clean, integer.placement)
    activations = {
        name: bits for name, bits in wanted.activations.items() if name in facts.quantizable
    }
    shared = {name: owner for name, owner in wanted.shared.items() if owner in activations}
    placement = Placement("integer", wanted.weights, activations, shared)
    old = set(integer.placement.activations)
    insert_quantizers(integer.network, placement, _disabled_quantizer)
    integer.placement = placement
    new = {name: integer.quantizer(name) for name in activations if name not in old}
    tuning = integer.recipe.tuning
    batches = list(torch.split(images[: tuning.calibration_images], _BATCH))
    calibrate(integer.network, new, batches, power=tuning.power, asymmetric=tuning.asymmetric)
    for quantizer in new.values():
        quantizer.stretch(tuning.edge_margin)
    _cover_pixels(integer, new)
    for quantizer in new.values():
        quantizer.settle()
        quantizer.enabled = True
    return placement


def _disabled_quantizer(bits: int) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, log_scale=False)
    quantizer.enabled = False
    return quantizer


def _cover_pixels(integer: Student, new: dict[str, ActivationQuantizer]) -> None:
    """Let the input's grid span exactly the values that pixels can take, where they are known.

    Synthetic images need not reach black and white; real ones will.
    """
    image = next(n for n in integer.network.graph.nodes if n.op == "placeholder")
    info = integer.info
    if image.name not in new or info.mean is None or info.std is None:
        return
    mean, std = torch.tensor(info.mean).double(), torch.tensor(info.std).double()
    low, high = float((-mean / std).min()), float(((1 - mean) / std).max())
    codes = quant_max(new[image.name].bits)
    scale = torch.tensor((max(high, 0.0) - min(low, 0.0)) / codes, dtype=torch.float32)
    zero = torch.round(-min(low, 0.0) / scale)
    new[image.name].set_grid(Grid(scale, zero, torch.zeros(())))


def _separate_shared_layers(network: GraphModule) -> dict[str, int]:
    """Give every call of a layer its own copy where the calls' inputs lie on different grids.

    The bias of a layer can lie on the accumulator's grid of one input only.

    Returns:
        Bits of the copies by module path.
    """
    copies: dict[str, int] = {}
    for path, nodes in calls(network).items():
        layer = network.get_submodule(path)
        if not isinstance(layer, QuantizedLayer) or layer.bias is None:
            continue
        first = input_quantizer(network, nodes[0])
        for number, node in enumerate(nodes[1:], start=2):
            if input_quantizer(network, node) is not first:
                node.target = f"{path}_{number}"
                network.add_submodule(str(node.target), QuantizedLayer(
                    layer.operator, layer.arguments, layer.frozen, layer.bias
                ))  # fmt: skip
                copies[str(node.target)] = layer.bits
    network.recompile()
    return copies


def _coarsen_pools(network: GraphModule, facts: Facts) -> None:
    """Raise steps behind global pools that are far finer than the average can tell apart.

    ONNX Runtime refuses to run a pool whose results would be multiples of more than 256 steps.
    Averages of all but constant maps end here, of what an instance norm returns for one.
    """
    for node in network.graph.nodes:
        grid = input_quantizer(network, node) if is_global_pool(node) else None
        for reader in node.users if grid is not None else ():
            output = module_of(network, reader)
            if isinstance(output, ActivationQuantizer) and grid is not None:
                pixels = math.prod(facts.shapes[node.all_input_nodes[0].name][2:])
                smallest = grid.scale / (LARGEST_POOL_STEP * pixels)
                if bool(output.scale < smallest):
                    output.set_grid(Grid(smallest, output.zero_point.clone(), torch.zeros(())))


def _center_depthwise(network: GraphModule) -> None:
    """Give the channels of 8-bit depthwise layers one zero point, in the middle of the range.

    ONNX Runtime's depthwise kernel takes one only; with several, another one runs, ten times slower.
    Narrower codes are stored less their zero points instead (`zsq.export.operators.weight_offset`),
    for which 8 bits have no room.
    """
    for layer in network.modules():
        if not isinstance(layer, QuantizedLayer) or not layer.is_depthwise or layer.bits < 8:
            continue
        weight = layer.frozen
        if bool((weight.zero_point == weight.zero_point[0]).all()):
            continue
        half = 2 ** (layer.bits - 1)
        values = weight()
        largest = values.abs().amax(tuple(range(1, values.ndim)))
        scale = (largest / (half - 1)).clamp(min=SMALLEST_SCALE)
        codes = torch.round(values / per_channel(scale, values)) + half
        layer.weight = FrozenWeight(codes, scale, torch.full_like(scale, half), layer.bits)


def _snap_biases(network: GraphModule) -> None:
    for node in network.graph.nodes:
        layer = module_of(network, node)
        quantizer = input_quantizer(network, node) if isinstance(layer, QuantizedLayer) else None
        if isinstance(layer, QuantizedLayer) and layer.bias is not None and quantizer is not None:
            _make_room_for_bias(layer, quantizer.scale)
            layer.snap_bias(quantizer.scale)


def _make_room_for_bias(layer: QuantizedLayer, input_scale: Tensor) -> None:
    """Coarsen the weight grid of channels whose bias would not fit into 32 bits.

    Such a channel's weights are all but zero beside its bias: a dead channel behind a batch norm.
    """
    assert layer.bias is not None
    weight = layer.frozen
    needed = layer.bias.abs() / (input_scale * LARGEST_BIAS)
    scale = torch.maximum(weight.scale, needed)
    if torch.equal(scale, weight.scale):
        return
    zero = per_channel(weight.zero_point, weight.integers)
    ratio = per_channel(weight.scale / scale, weight.integers)
    codes = torch.round((weight.integers - zero) * ratio) + zero
    layer.weight = FrozenWeight(codes, scale, weight.zero_point, weight.bits)
