# SPDX-License-Identifier: Apache-2.0
"""Folding into frozen quantizers, exactly: batch norms into weights, clamps into code ranges.

Both are exact because of what they touch. A batch norm scales every output channel, and so does a
weight's step: the codes stay, only a negative gamma mirrors them. A clamp before a quantizer bounds
the codes, because rounding is monotone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.functional.affine import SMALLEST_SCALE, quant_max
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.protocol import CLAMPS
from zsq.quantizers.weight import FrozenWeight
from zsq.teacher.fold import calls, module_of
from zsq.teacher.layers import BatchNorm, operator_name

_DEPTHWISE = {3: "aten.conv1d.default", 4: "aten.conv2d.default", 5: "aten.conv3d.default"}


@torch.no_grad()
def fold_into_frozen(layer: QuantizedLayer, batch_norm: BatchNorm) -> QuantizedLayer:
    """Return a layer that also does what ``batch_norm`` does after it, with mirrored or equal codes.

    With ``g, h`` the batch norm's affine map: ``scale[c] * |g[c]|``, ``bias[c] * g[c] + h[c]``; where
    ``g[c] < 0`` also ``quant_max - code`` and ``quant_max - zero_point``; where ``g[c] = 0`` every
    code becomes the zero point.

    Args:
        layer: frozen.
        batch_norm: what alone reads it.

    Returns:
        A new layer; both arguments stay as they are.
    """
    gain, shift = copy.deepcopy(batch_norm).double().scale_and_shift()
    weight, high = layer.frozen, quant_max(layer.bits)
    codes, zero = weight.integers.float(), weight.zero_point
    column = (-1, *[1] * (codes.ndim - 1))
    negative = gain < 0
    codes = torch.where(negative.reshape(column), high - codes, codes)
    zero = torch.where(negative, high - zero, zero)
    codes = torch.where((gain == 0).reshape(column), zero.reshape(column), codes)
    scale = torch.where(gain == 0, weight.scale.double(), weight.scale.double() * gain.abs())
    bias = shift if layer.bias is None else layer.bias.double() * gain + shift
    frozen = FrozenWeight(codes, scale.float(), zero, layer.bits)
    return QuantizedLayer(layer.operator, layer.arguments, frozen, bias.float())


def fold_batch_norms(network: GraphModule) -> None:
    """Fold every batch norm that alone reads a frozen layer, in place.

    The layer's call takes over the name of the batch norm's node, because that is the name that a
    quantizer behind it goes by.
    """
    sites = calls(network)
    for node in list(network.graph.nodes):
        batch_norm = module_of(network, node)
        source = node.args[0] if isinstance(batch_norm, BatchNorm) else None
        if not isinstance(batch_norm, BatchNorm) or not isinstance(source, Node):
            continue
        layer = module_of(network, source)
        path = str(source.target)
        alone = len(source.users) == 1 and len(sites.get(path, ())) == 1
        if isinstance(layer, QuantizedLayer) and alone and len(sites[str(node.target)]) == 1:
            put_module(network, path, fold_into_frozen(layer, batch_norm))
            node.target, node.args = path, source.args
            node.meta["path"] = path
            network.graph.erase_node(source)
    network.recompile()


@torch.no_grad()
def batch_norms_to_layers(network: GraphModule, ranks: dict[str, int]) -> dict[str, int]:
    """Replace the batch norms that are left by depthwise 1x1 convolutions, in place.

    One weight a channel is exact in 8 bits whatever it is: its own step times the outermost code.
    Runtimes have no integer batch norm, but an integer depthwise convolution.

    Args:
        network: with quantizers in front of its batch norms.
        ranks: number of axes of each node's result, by node name.

    Returns:
        Bits of the new layers by module path.
    """
    created = {}
    for node in network.graph.nodes:
        batch_norm = module_of(network, node)
        operator = _DEPTHWISE.get(ranks.get(node.name, 0))
        if isinstance(batch_norm, BatchNorm) and operator is not None:
            layer = _depthwise(batch_norm, operator, ranks[node.name] - 2)
            put_module(network, str(node.target), layer)
            created[str(node.target)] = 8
    network.recompile()
    return created


def _depthwise(batch_norm: BatchNorm, operator: str, spatial: int) -> QuantizedLayer:
    gain, shift = copy.deepcopy(batch_norm).double().scale_and_shift()
    high, channels = quant_max(8), gain.numel()
    codes = torch.where(gain > 0, high, 0.0).reshape(-1, 1, *[1] * spatial)
    zero = torch.where(gain < 0, float(high), 0.0)
    scale = (gain.abs() / high).clamp(min=SMALLEST_SCALE)
    ones, zeros = [1] * spatial, [0] * spatial
    frozen = FrozenWeight(codes, scale.float(), zero, 8)
    return QuantizedLayer(operator, (ones, zeros, ones, channels), frozen, shift.float())


def put_module(network: GraphModule, path: str, module: torch.nn.Module) -> None:
    """Put ``module`` at ``path``, keeping the modules nested below whatever was there."""
    parent, _, last = path.rpartition(".")
    holder = network.get_submodule(parent)
    for name, child in (
        holder.get_submodule(last).named_children() if last in holder._modules else ()
    ):
        if not isinstance(child, FrozenWeight):
            module.add_module(name, child)
    holder.add_module(last, module)


def fold_clamps(network: GraphModule) -> None:
    """Fold every ReLU, ReLU6 and hardtanh that only one quantizer reads into its code range, in place.

    ``round(clamp(x, a, b) / s) = clamp(round(x / s), round(a / s), round(b / s))``, so ReLU raises
    ``low`` to the zero point and ReLU6 lowers ``high`` to ``round(6 / scale) + zero_point``.
    """
    for node in list(network.graph.nodes):
        if operator_name(node.target) not in CLAMPS or len(node.users) != 1:
            continue
        reader = next(iter(node.users))
        quantizer = module_of(network, reader)
        source = node.args[0]
        if not isinstance(quantizer, ActivationQuantizer) or not isinstance(source, Node):
            continue
        low, high = clamp_range(node)
        quantizer.low = max(
            quantizer.low, min(_code(quantizer, low, quantizer.low), quantizer.high)
        )
        quantizer.high = min(
            quantizer.high, max(_code(quantizer, high, quantizer.high), quantizer.low)
        )
        reader.replace_input_with(node, source)
        network.graph.erase_node(node)
    network.recompile()


def clamp_range(node: Node) -> tuple[float, float]:
    """Return the bounds of a clamp node; infinite where it has none."""
    name = operator_name(node.target)
    if name == "aten.relu.default":
        return 0.0, float("inf")
    if name == "aten.relu6.default":
        return 0.0, 6.0
    bounds = [*node.args[1:], *[-1.0, 1.0][len(node.args) - 1 :]]
    values = [
        node.kwargs.get(key, bound)
        for key, bound in zip(("min_val", "max_val"), bounds, strict=True)
    ]
    return float(values[0]), float(values[1])  # type: ignore[arg-type]


def _code(quantizer: ActivationQuantizer, value: float, unbounded: int) -> int:
    if value in (float("inf"), float("-inf")):
        return unbounded
    bound: Tensor = torch.round(torch.tensor(value) / quantizer.scale.detach().cpu())
    return int(bound) + int(quantizer.zero_point)
