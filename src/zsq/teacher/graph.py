# SPDX-License-Identifier: Apache-2.0
"""From any exportable module to a *network*: a small graph of layers, batch norms and ATen calls.

``torch.export`` reads the module once, in eval mode and with a free batch size. The result is
rebuilt (`zsq.teacher.builder`) as a `torch.fx.GraphModule` in which

* every convolution and linear layer is a `Layer` at the user's own module path,
* every batch norm with stored statistics is a `BatchNorm`,
* attention and `einsum` are written out as matrix products (`zsq.teacher.decompose`),
* everything else is an out-of-place ATen call,
* whatever depends on parameters only (weight standardisation, say) is computed once.

One representation then serves synthesis, quantization, reconstruction units, saving and export.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from zsq.errors import UsageError
from zsq.teacher.batchsize import localise_batch_size
from zsq.teacher.builder import NetworkBuilder, several_inputs
from zsq.teacher.decompose import needs_writing_out, written_out
from zsq.teacher.devices import follow_input
from zsq.teacher.layers import is_inplace, is_view


def export_module(module: nn.Module, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """Export ``module`` in eval mode with a free batch size.

    Args:
        module: any module of one image tensor.
        input_shape: shape of one image, without the batch axis: (C, H, W).

    Raises:
        UsageError: the module needs more than one input, rejects that shape, or cannot be exported.
    """
    _check_one_input(module)
    with _eval_mode(module):
        try:
            example = torch.zeros(2, *input_shape)  # fails where the shape is beyond all memory
            with torch.no_grad():
                module(example)
        except Exception as error:
            raise UsageError(
                f"the model rejects an input of shape (2, {', '.join(map(str, input_shape))}): "
                f"{_brief(error)}. Pass the shape of one image, e.g. --input-shape 3,224,224."
            ) from error
        try:
            with _silence():
                return _export(module, example)
        except Exception as error:
            raise UsageError(
                f"torch.export cannot read this model's graph: {_brief(error)}. Make its forward "
                "free of data-dependent Python control flow and of a fixed batch size, or pass a "
                ".pt2 file that torch.export saved."
            ) from error


def _export(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Export with a free batch size; where plain tracing fixes it, as `len` does, by reading bytecode."""
    free = ({0: torch.export.Dim.DYNAMIC},)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=free, strict=False)
    except Exception as error:
        try:
            return torch.export.export(module, (example,), dynamic_shapes=free, strict=True)
        except Exception:
            raise error from None  # the usual way's, which says more


def _check_one_input(module: nn.Module) -> None:
    """Refuse a module whose forward cannot be called with one tensor."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that hides its signature: calling it will tell
        return
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise several_inputs(len(required))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode for the block, and every part of it back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _silence() -> Iterator[None]:
    """Keep torch.export's warnings, and the graphs it prints before an error, off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def build_network(program: torch.export.ExportedProgram) -> GraphModule:
    """Rebuild an exported program as a network (see the module docstring).

    Args:
        program: from `export_module` or a ``.pt2`` file.

    Returns:
        A GraphModule in eval mode, parameters frozen; node ``meta["path"]`` holds the user's module
        path. It computes what the exported module computes in eval mode.

    Raises:
        UsageError: several inputs or outputs, or operators outside the standard set.
    """
    products = needs_writing_out(program.graph)
    if products or _needs_functionalization(program.graph):
        with _silence():
            program = program.run_decompositions(written_out() if products else {})
    network = NetworkBuilder(program).build()
    network.graph.eliminate_dead_code()
    follow_input(network.graph)
    localise_batch_size(network.graph)
    network.graph.lint()
    network.recompile()
    return network.eval().requires_grad_(False)


def _brief(error: Exception) -> str:
    """First line of an error, short enough for one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def _needs_functionalization(graph: Graph) -> bool:
    """Whether the graph writes into views or holds sub-graphs; both are rare, and slow to undo."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        written = node.args[0] if is_inplace(node) and node.args else None
        if isinstance(written, Node) and (is_view(written) or any(map(is_view, written.users))):
            return True
    return False
