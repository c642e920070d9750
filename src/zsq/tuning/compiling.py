# SPDX-License-Identifier: Apache-2.0
"""Compiled losses of pieces. Blocks of equal shape, the rule in real networks, share one of them.

A compiler fuses what a step does between its convolutions: rounding, masks, soft bits, regulariser
and their gradients. It takes half a minute a structure, so it is asked only where that is repaid.
What it compiles is a function of tensors: a copy of the first piece of a structure computes, with
the parameters, buffers and masks of the piece that is being tuned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node

from zsq.functional.losses import reconstruction_error
from zsq.functional.rounding import rounding_regularizer
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.weight import SoftRoundWeight
from zsq.runtime.policy import Policy
from zsq.teacher.layers import operator_name
from zsq.tuning.pieces import Piece

#: Elements that the steps of a piece put out in all, from which compiling it is repaid on a CPU.
REPAID = 2_000_000_000
#: Steps from which it is on a GPU, where an eager step is some hundred launches of any size (an estimate).
REPAID_STEPS = 2_000

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""inputs, target, beta, the regulariser's weight, channels' importance -> total loss, reconstruction error."""


@dataclass
class PieceCompiler:
    """Compiles the losses of a sweep's pieces, one for all pieces of a structure.

    Attributes:
        policy: whether to compile at all.
        note: told when compilation fails; the loss is then computed without it.
        templates: what was compiled, by structure.
    """

    policy: Policy
    note: Callable[[str], None]
    templates: dict[str, _Template] = field(default_factory=dict)

    def worth(self, steps: int, batch: int, target: Tensor) -> bool:
        """Return whether steps on batches of ``target``'s images repay a compilation.

        It depends on sizes alone, not on the clock, so that runs repeat themselves.
        """
        if self.policy.device.type == "cuda":
            return self.policy.compile and steps >= REPAID_STEPS
        return self.policy.compile and steps * batch * target[0].numel() >= REPAID

    def loss(
        self, piece: Piece, quantizers: Iterable[ActivationQuantizer], sample: Tensor, *,
        power: float, policy: Policy,
    ) -> Loss:  # fmt: skip
        """Return a piece's loss, compiled when it is first called.

        Args:
            piece: being tuned.
            quantizers: those whose elements are dropped at random.
            sample: a batch of the piece's inputs.
            power: of the reconstruction error.
            policy: precision of the piece's passes.
        """
        seen, chosen = _quantizer_inputs(piece.student, sample), set(quantizers)
        dropping = {
            path: tensor for path, tensor in seen.items()
            if piece.student.get_submodule(path) in chosen
        }  # fmt: skip
        for path, tensor in dropping.items():
            _quantizer(piece.student, path).draw_mask(tensor)  # the template's copy needs one too
        key = f"{structure(piece.student)} {tuple(sample.shape)} {len(dropping)} {power} {policy}"
        if key not in self.templates:
            self.templates[key] = _Template(piece, power, policy, self.note)
        template = self.templates[key]
        names = template.names_in(piece.student)

        def loss(
            inputs: Tensor, target: Tensor, beta: Tensor, weight: Tensor, importance: Tensor | None
        ) -> Any:
            for path, tensor in dropping.items():
                _quantizer(piece.student, path).draw_mask(tensor)
            tensors = dict(piece.student.named_parameters()) | dict(piece.student.named_buffers())
            state = {ours: tensors[theirs] for ours, theirs in names.items()}
            return template.compiled(state, inputs, target, beta, weight, importance)

        return loss


class _Template:
    """The compiled loss of all pieces of one structure, computed by a copy of the first."""

    def __init__(
        self, piece: Piece, power: float, policy: Policy, note: Callable[[str], None]
    ) -> None:
        self.student = copy.deepcopy(piece.student)
        self.weights = [m for m in self.student.modules() if isinstance(m, SoftRoundWeight)]
        self.power, self.policy = power, policy
        self.compiled = policy.compiled(self._loss, enabled=True, note=note)

    def _loss(
        self, state: dict[str, Tensor], inputs: Tensor, target: Tensor, beta: Tensor, weight: Tensor,
        importance: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with self.policy.autocast():
            outputs = functional_call(self.student, state, (inputs,))
        error = reconstruction_error(outputs.float(), target, self.power, importance)
        terms = [rounding_regularizer(w.used_bits, beta) for w in self.weights]
        return (error + weight * torch.stack(terms).sum() if terms else error), error

    def names_in(self, other: GraphModule) -> dict[str, str]:
        """Return the name, in a piece of the same structure, of each tensor of the template."""
        pairs = dict(zip(_targets(self.student), _targets(other), strict=True))
        names = [name for name, _ in self.student.named_parameters()]
        names += [name for name, _ in self.student.named_buffers()]
        found = {}
        for name in names:
            owner = next((t for t in pairs if name == t or name.startswith(f"{t}.")), None)
            if owner is not None:
                found[name] = pairs[owner] + name.removeprefix(owner)
        return found


def structure(piece: GraphModule) -> str:
    """Describe a piece's graph, operators and tensors' shapes, without the names that it uses.

    Two pieces of equal structure compute the same function of their tensors.
    """
    place = {node: i for i, node in enumerate(piece.graph.nodes)}
    lines = []
    for node in piece.graph.nodes:
        arguments = torch.fx.map_arg((node.args, node.kwargs), lambda n: f"%{place[n]}")
        if node.op == "call_module":
            module = piece.get_submodule(str(node.target))
            tensors = [*module.named_parameters(), *module.named_buffers()]
            what = f"{module} {[(n, tuple(t.shape), t.dtype) for n, t in tensors]}"
        elif node.op in {"placeholder", "get_attr", "output"}:
            what = node.op
        else:
            what = operator_name(node.target)
        lines.append(f"{what} {arguments}")
    return "\n".join(lines)


def _targets(piece: GraphModule) -> list[str]:
    """Return the paths of modules and constants that a graph uses, in order, each once."""
    used = [str(n.target) for n in piece.graph.nodes if n.op in {"call_module", "get_attr"}]
    return list(dict.fromkeys(used))


def _quantizer(piece: GraphModule, path: str) -> ActivationQuantizer:
    module = piece.get_submodule(path)
    assert isinstance(module, ActivationQuantizer)
    return module


class _QuantizerInputs(Interpreter):
    def __init__(self, piece: GraphModule) -> None:
        super().__init__(piece)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module" and str(n.target).startswith("quantizers."):
            self.seen[str(n.target)] = self.env[n.all_input_nodes[0]]
        return super().run_node(n)


@torch.no_grad()
def _quantizer_inputs(piece: GraphModule, sample: Tensor) -> dict[str, Tensor]:
    """Return what each activation quantizer is given, by the quantizer's path."""
    interpreter = _QuantizerInputs(piece)
    interpreter.run(sample)
    return interpreter.seen
