# SPDX-License-Identifier: Apache-2.0
"""Writing a network's graph from an exported one, node by node."""

from __future__ import annotations

import re
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
    check_float32,
    is_inplace,
    operator_name,
    out_of_place,
    resolve_operator,
)
from zsq.teacher.shapes import expression_of, noted_shape
from zsq.teacher.spelling import ALIASES, ASSERTIONS, COPIES, changes_nothing, respelled
from zsq.teacher.tree import add_module, as_node, attribute, child, flat, plain

_BATCH_NORMS = frozenset(
    {"aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"}
)
#: Of these the sixth argument says whether the batch's own statistics count.
_TRAINABLE_NORMS = frozenset({
    "aten.batch_norm.default", "aten._native_batch_norm_legit.default",
    "aten._native_batch_norm_legit_functional.default",
})  # fmt: skip
#: Names that fx, or a part of zsq that adds modules of its own, needs at the top of a network.
_RESERVED = frozenset({"graph", "code", "training", "constants", "quantizers", "shifts"})


def several_inputs(count: int) -> UsageError:
    """Return the error of a model that takes ``count`` inputs."""
    return UsageError(
        f"the model takes {count} inputs; zsq needs exactly one image tensor. "
        "Wrap the model in a module whose forward takes one tensor."
    )


class NetworkBuilder:
    """Walks an exported graph once and writes the network's graph.

    Args:
        program: without writes into views and without sub-graphs.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.graph = Graph()
        self.root = nn.Module()
        self.constants: dict[Node, Any] = {}  # source node -> value known at build time
        self.names: dict[Node, str] = {}  # source node of a parameter -> its name
        self.new: dict[Node, Node] = {}  # source node -> node of the network
        self.memory: dict[Node, Node] = {}  # source node -> the node whose memory it shares
        self.layers: dict[tuple[Any, ...], str] = {}
        self.buffers: dict[int, tuple[str, Tensor]] = {}  # id of a constant -> path, constant

    def build(self) -> GraphModule:
        """Return the network.

        Raises:
            UsageError: several inputs or outputs, or operators outside the standard set.
        """
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
            raise several_inputs(len(inputs))
        for node in self.program.graph.nodes:
            if node.op == "get_attr":  # constants of sub-graphs and lifted tensors
                self.constants[node] = attribute(self.program.graph_module, str(node.target))
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self.new[node] = self._noted(node, self.graph.placeholder("x"), "")
            else:
                self.constants[node] = state[spec.target]
                self.names[node] = str(spec.target)

    def _output(self, node: Node) -> None:
        kinds = self.program.graph_signature.user_outputs
        results = [n for n in flat(node.args[0]) if isinstance(n, Node) and n.name in kinds]
        layout = self.program.call_spec.out_spec
        structured = layout is not None and layout.num_children > 0
        if len(results) != 1 or structured:
            raise UsageError(
                f"the model returns a tuple, list or dict with {len(results)} tensor(s); zsq needs "
                "one tensor of logits. Wrap it in a module whose forward returns just that tensor."
            )
        if results[0] not in self.new:
            raise UsageError(
                "the model's output does not depend on its input; nothing to quantize."
            )
        self.graph.output(self.new[results[0]])

    def _call(self, node: Node) -> None:
        name = operator_name(node.target)
        short = name.split(".")[1] if "." in name else name
        if short.startswith(ASSERTIONS):
            return
        if self._is_constant(node):
            self._fold_constant(node)
        elif short in ALIASES or short in COPIES or changes_nothing(node, name):
            source = as_node(node.args[0])
            self.new[node] = self.new[source]
            if short in ALIASES:
                self.memory[node] = self._owner(source)
        elif name in LAYER_OPERATORS and self._weight_is_constant(node):
            self.new[node] = self._layer(node, name)
        elif name in _BATCH_NORMS | _TRAINABLE_NORMS and self._has_statistics(node, name):
            self.new[node] = self._batch_norm(node, name)
        elif short in {"copy", "copy_"}:
            self._copy(node)
        elif name == "operator.getitem" and self._of_batch_norm(node):
            self.new[node] = self.new[as_node(node.args[0])]
        else:
            self._plain_call(node, name)

    def _is_constant(self, node: Node) -> bool:
        if not node.all_input_nodes:  # torch.arange and the like, but not torch.rand
            target = node.target
            return isinstance(target, torch._ops.OpOverload) and (
                torch.Tag.nondeterministic_seeded not in target.tags
            )
        return all(n in self.constants for n in node.all_input_nodes)

    def _fold_constant(self, node: Node) -> None:
        values: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
        arguments, keywords = values
        target = node.target
        assert callable(target)
        if is_inplace(node):  # never write into the user's parameters
            arguments = (arguments[0].clone(), *arguments[1:])
        self.constants[node] = target(*arguments, **keywords)
        named = [self.names[n] for n in node.all_input_nodes if n in self.names]
        if named:  # a weight made out of parameters bears the name of the first
            self.names[node] = named[0]
        if is_inplace(node):
            self._overwrite(node)

    def _weight_is_constant(self, node: Node) -> bool:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        return weight in self.constants and (bias is None or bias in self.constants)

    def _has_statistics(self, node: Node, name: str) -> bool:
        mean, variance = node.args[3], node.args[4]
        stored = mean in self.constants and variance in self.constants
        training = name in _TRAINABLE_NORMS and bool(node.args[5])
        if stored and training:  # answers would depend on the batch
            raise UsageError(
                f"batch norm {self._path(node) or str(mean)!r} does not use its running statistics: the "
                "network was exported in training mode; call model.eval() before torch.export."
            )
        return stored and name in _BATCH_NORMS

    def _of_batch_norm(self, node: Node) -> bool:
        source, index = node.args[0], node.args[1]
        if not isinstance(source, Node) or operator_name(source.target) not in _BATCH_NORMS:
            return False
        return bool(index == 0)

    def _layer(self, node: Node, name: str) -> Node:
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        arguments: Any = tuple(plain(a) for a in rest[1:])
        key = (weight, bias, name, str(arguments))
        if key not in self.layers:
            path = self._free_path(self._path(node) or self._parameter_path(as_node(weight)))
            check_float32(path, self._value(weight))
            layer = Layer(name, self._value(weight), self._value(bias), arguments)
            add_module(self.root, path, layer)
            self.layers[key] = path
        return self._module_node(node, self.layers[key], as_node(x))

    def _batch_norm(self, node: Node, name: str) -> Node:
        x, weight, bias, mean, variance = node.args[:5]
        eps: Any = node.args[7] if name == "aten.batch_norm.default" else node.args[6]
        path = self._free_path(self._path(node) or self._parameter_path(as_node(mean)))
        gamma, beta = self._value(weight), self._value(bias)
        mean, variance = self._value(mean), self._value(variance)
        add_module(self.root, path, BatchNorm(gamma, beta, mean, variance, float(eps)))
        return self._module_node(node, path, as_node(x))

    def _value(self, operand: object) -> Any:
        return self.constants[operand] if isinstance(operand, Node) else None

    def _module_node(self, node: Node, path: str, x: Node) -> Node:
        return self._noted(node, self.graph.call_module(path, (self.new[x],)), path)

    def _copy(self, node: Node) -> None:
        """Write ``target.copy_(source)`` as the source itself: ATen's copy has no gradient."""
        target, source = as_node(node.args[0]), as_node(node.args[1])
        wanted, given = node.meta["val"], source.meta["val"]
        value = self._operand(source)
        if wanted.dtype != given.dtype:
            value = self._added(node, "aten.to.dtype", value, wanted.dtype)
        if wanted.shape != given.shape:
            value = self._added(node, "aten.expand_as.default", value, self._operand(target))
        self.new[node] = value
        if is_inplace(node):
            self._overwrite(node)

    def _added(self, node: Node, name: str, *arguments: Any) -> Node:
        """Return a new call of an operator, noted as if it were ``node``."""
        created = self.graph.call_function(resolve_operator(name), arguments)
        return self._noted(node, created, self._path(node))

    def _plain_call(self, node: Node, name: str) -> None:
        if node.kwargs.get("out") is not None or not (
            name.startswith("aten.") or name in SCALAR_OPERATORS
        ):
            raise UsageError(
                f"the model calls the operator {name!r}, which is not a standard (aten) operator; "
                "rewrite that part with standard torch functions."
            )
        operands: Any = torch.fx.map_arg((node.args, node.kwargs), self._operand)
        args, kwargs = operands
        arguments: Any = plain(tuple(args))
        plain_name = out_of_place(name) if is_inplace(node) else name
        spelled, arguments = respelled(node, plain_name, arguments)
        created = self.graph.call_function(resolve_operator(spelled), arguments, dict(kwargs))
        self.new[node] = self._noted(node, created, self._path(node))
        if is_inplace(node):
            self._overwrite(node)

    def _noted(self, node: Node, created: Node, path: str) -> Node:
        """Write down what units and protocols want to know of a new node."""
        value = node.meta.get("val")
        scalar = not isinstance(value, (Tensor, list, tuple))
        created.meta.update(path=path, scalar=scalar)
        if isinstance(value, Tensor):
            created.meta["shape"] = noted_shape(value)
        if scalar:
            created.meta["expression"] = expression_of(value)
        return created

    def _owner(self, node: Node) -> Node:
        return self.memory.get(node, node)

    def _overwrite(self, node: Node) -> None:
        """Let whoever reads the memory that ``node`` wrote to read its result from here on."""
        owner = self._owner(as_node(node.args[0]))
        self.memory[node] = owner
        for source in [*self.new, *self.constants]:
            if self._owner(source) is not owner or source is node:
                continue
            self.new.pop(source, None)
            self.constants.pop(source, None)
            if node in self.new:
                self.new[source] = self.new[node]
            else:
                self.constants[source] = self.constants[node]

    def _operand(self, node: Node) -> Node:
        if node in self.new:
            return self.new[node]
        value: Any = self.constants[node]
        if not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]
        if id(value) not in self.buffers:
            path = self._new_buffer(self.names.get(node, node.name), value)
            self.buffers[id(value)] = path, value
        return self.graph.get_attr(self.buffers[id(value)][0])

    def _new_buffer(self, name: str, value: Tensor) -> str:
        if "constants" not in self.root._modules:
            self.root.add_module("constants", nn.Module())
        holder = self.root.get_submodule("constants")
        name = base = re.sub(r"\W", "_", name)
        while hasattr(holder, name):
            name = f"{base}_{len(holder._buffers)}"
        holder.register_buffer(name, value.detach().clone())
        return f"constants.{name}"

    def _path(self, node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        return re.sub(r"[^\w.]", "_", path.split("@")[0])

    def _parameter_path(self, node: Node) -> str:
        return self.names.get(node, node.name).rpartition(".")[0] or node.name

    def _free_path(self, path: str) -> str:
        """Return a module path nobody uses yet, that fx does not need for itself."""
        first = path.split(".")[0]
        if not path or hasattr(GraphModule, first) or first in _RESERVED:
            path = f"network.{path}" if path else "network"
        candidate, number = path, 2
        while isinstance(child(self.root, candidate), (Layer, BatchNorm)):
            candidate, number = f"{path}_{number}", number + 1
        return candidate
