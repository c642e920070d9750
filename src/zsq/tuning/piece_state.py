# SPDX-License-Identifier: Apache-2.0
"""What is kept of a piece that was tuned, and put back when a run is resumed."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq.quantizers.layers import QuantizedLayer
from zsq.tuning.pieces import Piece, layer_modules, quantizer_modules


def piece_state(piece: Piece, *, activations: bool) -> dict[str, Tensor]:
    """Return everything that tuning decided about a piece, of its activations too if they took part."""
    state: dict[str, Tensor] = {}
    for path, layer in layer_modules(piece).items():
        frozen = layer.frozen
        state[f"{path}.codes"] = frozen.integers
        state[f"{path}.scale"] = frozen.scale
        state[f"{path}.zero_point"] = frozen.zero_point
        if layer.bias is not None:
            state[f"{path}.bias"] = layer.bias.detach()
    for name, quantizer in quantizer_modules(piece).items() if activations else ():
        state[f"quantizers.{name}.raw_scale"] = quantizer.raw_scale
        state[f"quantizers.{name}.zero_point"] = quantizer.zero_point
    return state


@torch.no_grad()
def restore_piece(piece: Piece, state: dict[str, Tensor]) -> None:
    """Put back what `piece_state` kept; the piece is as if it had just been tuned."""
    for path, layer in layer_modules(piece).items():
        saved = {k: state[f"{path}.{k}"] for k in ("codes", "scale", "zero_point")}
        _restore_layer(layer, saved, state.get(f"{path}.bias"))
    for name, quantizer in quantizer_modules(piece).items():
        if f"quantizers.{name}.raw_scale" not in state:
            continue  # a pass over the weights alone
        quantizer.raw_scale.copy_(state[f"quantizers.{name}.raw_scale"])
        quantizer.zero_point.copy_(state[f"quantizers.{name}.zero_point"])
        quantizer.calibrated.fill_(True)
        quantizer.enabled = True


def _restore_layer(layer: QuantizedLayer, saved: dict[str, Tensor], bias: Tensor | None) -> None:
    layer.freeze()
    frozen = layer.frozen
    frozen.integers.copy_(saved["codes"])
    frozen.scale.copy_(saved["scale"])
    frozen.zero_point.copy_(saved["zero_point"])
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
