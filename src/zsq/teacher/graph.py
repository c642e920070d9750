# SPDX-License-Identifier: Apache-2.0
"""From any exportable module to a *network*: a small graph of layers, batch norms and ATen calls.

``torch.export`` reads the module once, in eval mode and with a free batch size. The result is
rebuilt as a `torch.fx.GraphModule` in which

* every convolution and linear layer is a `Layer` at the user's own module path,
* every batch norm with stored statistics is a `BatchNorm`,
* everything else is an out-of-place ATen call,
* whatever depends on parameters only (weight standardisation, say) is computed once.

One representation then serves synthesis, quantization, reconstruction units, saving and export.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from zsq.errors import UsageError
from zsq.teacher.layers import (
    LAYER_OPERATORS,
    SCALAR_OPERATORS,
    BatchNorm,
    Layer,
    operator_name,
    resolve_operator,
)

#: Contiguity copies are dropped below, so every view may meet any layout: reshape does the same then.
_VIEWS = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}
_IDENTITIES = frozenset({"alias", "detach", "contiguous", "clone", "lift_fresh_copy", "detach_"})
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "native_dropout", "dropout_"})
_ASSERTIONS = ("_assert", "sym_constrain")
_BATCH_NORMS = frozenset({"aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"})


def export_module(module: nn.Module, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """Export ``module`` in eval mode with a free batch size.

    Args:
        module: any module of one image tensor.
        input_shape: shape of one image, without the batch axis: (C, H, W).

    Raises:
        UsageError: the module rejects that shape, or cannot be exported.
    """
    example = torch.zeros(2, *input_shape)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(example)
    except Exception as error:
        raise UsageError(
            f"the model rejects an input of shape (2, {', '.join(map(str, input_shape))}): {_brief(error)}. "
            "Pass the shape of one image, e.g. --input-shape 3,224,224."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
    except Exception as error:
        raise UsageError(
            f"torch.export cannot read this model's graph: {_brief(error)}. Make its forward free of "
            "data-dependent Python control flow and of a fixed batch size, or pass a .pt2 file that "
            "torch.export saved."
        ) from error
    finally:
        module.train(training)


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
    if _needs_functionalization(program.graph):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions({})
    network = _Builder(program).build()
    network.graph.eliminate_dead_code()
    _localise_batch_size(network.graph)
    network.graph.lint()
    network.recompile()
    return network.eval().requires_grad_(False)


def _brief(error: Exception) -> str:
    """First line of an error, short enough for one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def _is_view(node: Node) -> bool:
    """Whether a node's result shares memory with its input, by the operator's own schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns and returns[0].alias_info and not returns[0].alias_info.is_write)


def _needs_functionalization(graph: Graph) -> bool:
    """Whether the graph writes into views or holds sub-graphs; both are rare, and slow to undo."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        written = _is_inplace(node) and node.args and isinstance(node.args[0], Node)
        if written and (_is_view(node.args[0]) or any(_is_view(user) for user in node.args[0].users)):
            return True
    return False


def _is_inplace(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(
        target._schema.arguments
        and target._schema.arguments[0].alias_info
        and target._schema.arguments[0].alias_info.is_write
    )


def _out_of_place(name: str) -> str:
    """``aten.relu_.default`` -> ``aten.relu.default``."""
    return re.sub(r"^(aten\.\w+?)_\.", r"\1.", name)


class _Builder:
    """Walks an exported graph once and writes the network's graph."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.graph = Graph()
        self.root = nn.Module()
        self.constants: dict[Node, Any] = {}  # source node -> value known at build time
        self.names: dict[Node, str] = {}  # source node of a parameter -> its name
        self.new: dict[Node, Node] = {}  # source node -> node of the network
        self.layers: dict[tuple[Any, ...], str] = {}

    def build(self) -> GraphModule:
        self._read_placeholders()
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node.op == "call_function":
                    self._call(node)
                elif node.op == "output":
                    self._output(node)
        return GraphModule(self.root, self.graph)

    def _read_placeholders(self) -> None:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        state = {**self.program.state_dict, **self.program.constants}
        inputs = [s for s in specs.values() if s.kind == InputKind.USER_INPUT]
        if len(inputs) != 1:
            raise UsageError(
                f"the model takes {len(inputs)} inputs; zsq needs exactly one image tensor. "
                "Wrap the model in a module whose forward takes one tensor."
            )
        for node in self.program.graph.nodes:
            if node.op == "get_attr":  # constants of sub-graphs and lifted tensors
                self.constants[node] = _attribute(self.program.graph_module, str(node.target))
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self.new[node] = self.graph.placeholder("x")
            else:
                self.constants[node] = state[spec.target]
                self.names[node] = str(spec.target)

    def _output(self, node: Node) -> None:
        outputs = node.args[0]
        kinds = self.program.graph_signature.user_outputs
        results = [n for n in _flat(outputs) if isinstance(n, Node) and n.name in kinds]
        structured = self.program.call_spec.out_spec is not None and (
            self.program.call_spec.out_spec.num_children > 0
        )
        if len(results) != 1 or structured:
            raise UsageError(
                f"the model returns a tuple, list or dict with {len(results)} tensor(s); zsq needs one "
                "tensor of logits. Wrap it in a module whose forward returns just that tensor."
            )
        if results[0] not in self.new:
            raise UsageError("the model's output does not depend on its input; nothing to quantize.")
        self.graph.output(self.new[results[0]])

    def _call(self, node: Node) -> None:
        name = operator_name(node.target)
        short = name.split(".")[1] if "." in name else name
        if short.startswith(_ASSERTIONS):
            return
        if self._is_constant(node):
            self._fold_constant(node)
        elif short in _IDENTITIES or short in _DROPOUTS:
            self.new[node] = self.new[node.args[0]]  # type: ignore[index]
        elif name in LAYER_OPERATORS and self._weight_is_constant(node):
            self.new[node] = self._layer(node, name)
        elif name in _BATCH_NORMS and self._has_statistics(node, name):
            self.new[node] = self._batch_norm(node, name)
        elif name == "operator.getitem" and self._of_batch_norm(node):
            self.new[node] = self.new[node.args[0]]  # type: ignore[index]
        else:
            self._plain_call(node, name)

    def _is_constant(self, node: Node) -> bool:
        inputs = node.all_input_nodes
        return bool(inputs) and all(n in self.constants for n in inputs)

    def _fold_constant(self, node: Node) -> None:
        values = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
        arguments, keywords = values  # type: ignore[misc]
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if _is_inplace(node):  # never write into the user's parameters
            arguments = (arguments[0].clone(), *arguments[1:])
        self.constants[node] = target(*arguments, **keywords)

    def _weight_is_constant(self, node: Node) -> bool:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        return weight in self.constants and (bias is None or bias in self.constants)

    def _has_statistics(self, node: Node, name: str) -> bool:
        mean, variance = node.args[3], node.args[4]
        stored = mean in self.constants and variance in self.constants
        training = name == "aten.batch_norm.default" and bool(node.args[5])
        return stored and not training

    def _of_batch_norm(self, node: Node) -> bool:
        source = node.args[0]
        return isinstance(source, Node) and operator_name(source.target) in _BATCH_NORMS and node.args[1] == 0

    def _layer(self, node: Node, name: str) -> Node:
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        arguments = tuple(_plain(a) for a in rest[1:])
        key = (weight, bias, name, str(arguments))
        if key not in self.layers:
            path = self._free_path(self._path(node) or self._parameter_path(weight))
            module = Layer(name, self.constants[weight], bias and self.constants[bias], arguments)  # type: ignore[index]
            _add_module(self.root, path, module)
            self.layers[key] = path
        return self._module_node(node, self.layers[key], self.new[x])  # type: ignore[index]

    def _batch_norm(self, node: Node, name: str) -> Node:
        x, weight, bias, mean, variance = node.args[:5]
        eps = node.args[7] if name == "aten.batch_norm.default" else node.args[6]
        path = self._free_path(self._path(node) or self._parameter_path(mean))
        values = [None if a is None else self.constants[a] for a in (weight, bias, mean, variance)]  # type: ignore[index]
        _add_module(self.root, path, BatchNorm(*values, float(eps)))  # type: ignore[arg-type]
        return self._module_node(node, path, self.new[x])  # type: ignore[index]

    def _module_node(self, node: Node, path: str, x: Node) -> Node:
        created = self.graph.call_module(path, (x,))
        created.meta["path"] = path
        return created

    def _plain_call(self, node: Node, name: str) -> None:
        if node.kwargs.get("out") is not None or not (
            name.startswith("aten.") or name in SCALAR_OPERATORS
        ):
            raise UsageError(
                f"the model calls the operator {name!r}, which is not a standard (aten) operator; "
                "rewrite that part with standard torch functions."
            )
        plain_name = _out_of_place(name) if _is_inplace(node) else name
        function = resolve_operator(_VIEWS.get(plain_name, plain_name))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._operand)  # type: ignore[misc]
        created = self.graph.call_function(function, tuple(_plain(args)), dict(kwargs))
        created.meta["path"] = self._path(node)
        created.meta["scalar"] = not isinstance(node.meta.get("val"), (Tensor, list, tuple))
        self.new[node] = created
        if _is_inplace(node):  # whoever reads the overwritten tensor from here on reads the result
            self._redirect(node.args[0], created)

    def _redirect(self, overwritten: Any, created: Node) -> None:
        old = self.new.get(overwritten)
        for source, target in list(self.new.items()):
            if target is old:
                self.new[source] = created

    def _operand(self, node: Node) -> Node:
        if node in self.new:
            return self.new[node]
        value = self.constants[node]
        if not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]
        path = "constants." + re.sub(r"\W", "_", self.names.get(node, node.name))
        if not hasattr(self.root, "constants"):
            self.root.add_module("constants", nn.Module())
        self.root.constants.register_buffer(path.split(".", 1)[1], value.detach().clone())  # type: ignore[union-attr]
        return self.graph.get_attr(path)

    def _path(self, node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        return re.sub(r"[^\w.]", "_", path.split("@")[0])

    def _parameter_path(self, node: Any) -> str:
        return self.names.get(node, node.name).rpartition(".")[0] or node.name

    def _free_path(self, path: str) -> str:
        """A module path nobody uses yet, that fx does not need for itself."""
        first = path.split(".")[0]
        if not path or hasattr(GraphModule, first) or first in {"graph", "code", "training", "constants"}:
            path = f"network.{path}" if path else "network"
        candidate, number = path, 2
        while isinstance(_child(self.root, candidate), (Layer, BatchNorm)):
            candidate, number = f"{path}_{number}", number + 1
        return candidate


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _plain(value: Any) -> Any:
    """Turn fx's immutable lists into plain ones."""
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _attribute(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _child(root: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        if part not in root._modules:
            return None
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    existing = root._modules.get(last)
    root.add_module(last, module)
    if existing is not None:  # a bare container made for something deeper: keep its children
        for name, child in existing.named_children():
            module.add_module(name, child)


def _localise_batch_size(graph: Graph) -> None:
    """Let every reshape read the batch size from its own input.

    Export reads it once, from the network's input, and carries it to the end; a reconstruction unit
    cut out of the middle could not see it. Expressions of the batch size are recomputed likewise.
    """
    for node in list(graph.nodes):
        tensors = [n for n in node.all_input_nodes if not n.meta.get("scalar")]
        scalars = [n for n in node.all_input_nodes if n.meta.get("scalar")]
        if node.op != "call_function" or node.meta.get("scalar") or not tensors or not scalars:
            continue
        for scalar in scalars:
            with graph.inserting_before(node):
                node.replace_input_with(scalar, _local_scalar(graph, scalar, tensors[0]))
    graph.eliminate_dead_code()


def _local_scalar(graph: Graph, scalar: Node, tensor: Node) -> Node:
    """Copy the arithmetic behind ``scalar``, reading the batch size from ``tensor``."""
    if operator_name(scalar.target) == "aten.sym_size.int":
        if scalar.args[1] != 0:  # only the batch axis is free
            return scalar
        copied = graph.call_function(scalar.target, (_batch_carrier(tensor), 0))  # type: ignore[arg-type]
    else:
        arguments = torch.fx.map_arg(
            scalar.args, lambda n: _local_scalar(graph, n, tensor) if n.meta.get("scalar") else n
        )
        copied = graph.call_function(scalar.target, arguments)  # type: ignore[arg-type]
    copied.meta["scalar"] = True
    copied.meta["path"] = scalar.meta.get("path", "")
    return copied


def _batch_carrier(tensor: Node) -> Node:
    """Nearest tensor upstream of a chain of reshapes whose first axis is the batch."""
    reshapes = {"aten.reshape.default", "aten.transpose.int", "aten.permute.default"}
    while operator_name(tensor.target) in reshapes and isinstance(tensor.args[0], Node):
        tensor = tensor.args[0]
    return tensor
