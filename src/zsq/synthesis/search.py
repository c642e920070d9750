# SPDX-License-Identifier: Apache-2.0
"""Searching a generator's architecture for a teacher (AutoReCon, arXiv 2105.12151).

The published code holds the architectures that were found, not the search. This one follows the
paper's description with the usual means of differentiable search: every edge of a super-network has
logits over its choices; a hard sample of the Gumbel-softmax says which one is used, and the logits get
their gradient straight through it. Weights and logits learn in turns, on the loss that the generator is
later trained with. The choices with the largest logits are the result.

A step of the weights computes the sampled choices only. A step of the logits computes all of them: the
gradient compares what the others would have put in the sampled one's place. Without them it would pull
at a logit even where all choices are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax

from zsq.runtime.checkpoints import Checkpoints, flat, part_of
from zsq.runtime.context import Context
from zsq.runtime.optimizers import (
    generator_states,
    optimizer_state,
    restore_generators,
    restore_optimizer,
)
from zsq.runtime.seeds import seeded
from zsq.runtime.terms import check_weights, record_terms
from zsq.synthesis.architecture import CROSSES, OPERATIONS, UPS, Architecture, Cell
from zsq.synthesis.autorecon import AutoReconGenerator, Edge
from zsq.synthesis.labels import plain_labels
from zsq.synthesis.objective import GeneratorObjective, count_classes
from zsq.teacher.teacher import Teacher

#: Steps between two records of the loss, and between two looks for NaN.
RECORD_EVERY = 50
#: Steps between two checkpoints.
CHECKPOINT_EVERY = 200
ADVICE = (
    "Use the published one with --set synthesis.architecture=published, or try --precision fp32."
)
_BLANK = Cell(("N", "N"), ("s",) * 5, ("0",) * 6)


@dataclass(frozen=True)
class SearchSettings:
    """How long and how to search.

    Attributes:
        steps: of the weights; the logits make as many after the warm-up.
        warmup: share of the steps before the logits learn.
        batch: images per step.
        weight_lr: of Adam on the weights.
        logit_lr: of Adam on the logits.
        statistics_weight: of the batch norm distance beside the cross-entropy.
        hot, cold: temperature of the Gumbel-softmax at the start and at the end.
    """

    steps: int = 20000
    warmup: float = 0.1
    batch: int = 200
    weight_lr: float = 1e-3
    logit_lr: float = 3e-3
    statistics_weight: float = 0.1
    hot: float = 5.0
    cold: float = 0.5


class _Choice(nn.Module):
    """An edge that is still open: one module per choice, and logits over them.

    Attributes:
        comparing: compute all choices, for the logits' gradient; otherwise the sampled one alone.
        sample: shares of the choices in the next pass, one of them 1; from `sample_choices`, as is
        chosen: the choice with it.
    """

    sample: Tensor
    chosen: str

    def __init__(self, choices: Sequence[str], *, up: bool, classes: int, channels: int) -> None:
        super().__init__()
        self.choices = tuple(choices)
        self.edges = nn.ModuleDict({
            choice: Edge(choice, up=up, classes=classes, channels=channels)
            for choice in choices if choice != "0"
        })  # fmt: skip
        self.logits = nn.Parameter(torch.zeros(len(choices)))
        self.temperature = 1.0
        self.comparing = False

    def forward(self, x: Tensor, classes: Tensor, weights: Tensor) -> tuple[Tensor | None, bool]:
        """Return the sampled choice's result, and whether it is another than "none".

        The result of "none" is None, or while comparing, zeros that carry the logits' gradient.
        """
        chosen = self.chosen
        real = chosen != "0"
        if not self.comparing:
            return self.edges[chosen](x, classes, weights) if real else None, real
        parts = []
        for i, choice in enumerate(self.choices):
            if choice == "0":  # adds nothing to the sum, whatever its share
                continue
            # the others count as constants: times a share of 0, no gradient passes through them
            with nullcontext() if choice == chosen else torch.no_grad():
                result = self.edges[choice](x, classes, weights)
            parts.append(self.sample[i] * result)
        return torch.stack(parts).sum(0), real

    def best(self, but: str = "") -> str:
        """Return the likeliest choice, other than ``but``."""
        order: list[int] = self.logits.argsort(descending=True).tolist()
        return next(self.choices[i] for i in order if self.choices[i] != but)


def sample_choices(choices: Sequence[_Choice]) -> None:
    """Draw what open edges do in the next pass; the host waits for all draws together, once."""
    for choice in choices:
        choice.sample = gumbel_softmax(choice.logits, choice.temperature, hard=True)
    drawn: list[int] = torch.stack([choice.sample.argmax() for choice in choices]).tolist()
    for choice, index in zip(choices, drawn, strict=True):
        choice.chosen = choice.choices[index]


class _OpenCell(nn.Module):
    """A cell whose edges are all open; see `zsq.synthesis.autorecon.CellNetwork`."""

    def __init__(self, classes: int, channels: int, crosses: int) -> None:
        super().__init__()

        def build(choices: Sequence[str], count: int, up: bool) -> nn.ModuleList:
            return nn.ModuleList(
                _Choice(choices, up=up, classes=classes, channels=channels) for _ in range(count)
            )

        self.ups = build(UPS, 2, True)
        self.operations = build(OPERATIONS, 5, False)
        self.crosses = build(CROSSES, crosses, True)

    def forward(
        self, x: Tensor, before: Sequence[Tensor | None], classes: Tensor, weights: Tensor
    ) -> list[Tensor | None]:
        nodes: list[Tensor | None] = [up(x, classes, weights)[0] for up in self.ups]
        for first_operation, sources, first_cross in ((0, 2, 0), (2, 3, 3)):
            edges = [(self.operations[first_operation + i], nodes[i]) for i in range(sources)]
            if len(self.crosses):
                edges += [(self.crosses[first_cross + i], before[i]) for i in range(3)]
            arriving = [edge(node, classes, weights) for edge, node in edges if node is not None]
            # reached by nothing but "none", a node does not exist, as in the network that is built
            reached = any(real for _, real in arriving)
            values = [y for y, _ in arriving if y is not None]
            nodes.append(torch.stack(values).sum(0) if reached else None)
        if nodes[3] is None:  # a sample without a way through: let the first node stand in
            nodes[3] = nodes[0]
        return nodes

    def best(self) -> Cell:
        ups, operations, crosses = (
            tuple(edge.best() for edge in edges if isinstance(edge, _Choice))
            for edges in (self.ups, self.operations, self.crosses)
        )
        cell = Cell(ups, operations, crosses)
        if cell.feeds(3):
            return cell
        first = self.operations[2]
        assert isinstance(first, _Choice)
        return Cell(ups, (*operations[:2], first.best(but="0"), *operations[3:]), crosses)


class _SuperNetwork(AutoReconGenerator):
    """The generator with every edge open."""

    def __init__(self, classes: int, image_shape: tuple[int, ...]) -> None:
        first = Cell(_BLANK.ups, _BLANK.operations)
        super().__init__(Architecture((first, _BLANK, _BLANK)), classes, image_shape)

    def _cell(self, cell: Cell, classes: int, channels: int) -> nn.Module:
        return _OpenCell(classes, channels, len(cell.crosses))

    def choices(self) -> list[_Choice]:
        return [module for module in self.modules() if isinstance(module, _Choice)]

    def best(self) -> Architecture:
        first, second, third = (cell.best() for cell in self.cells)  # type: ignore[operator]
        return Architecture.parse([str(first), str(second), str(third)])


def search_architecture(
    teacher: Teacher, settings: SearchSettings, context: Context
) -> Architecture:
    """Search a generator for a teacher.

    Args:
        teacher: must have batch norms with running statistics.
        settings: how long.
        context: seed, device, progress; an interrupted search goes on from its checkpoint. In a group
            process 0 searches, and keeps none.

    Raises:
        UsageError: no batch norm has running statistics.
        RunError: the loss became NaN.
    """
    with seeded(context.seed, "search"):
        search = _Search(teacher, settings, context)
        start = search.resume()
        title = "searching a generator"
        with context.reporter.task(title, settings.steps, completed=start) as task:
            for step in range(start, settings.steps):
                loss = search.step(step)
                if step % RECORD_EVERY == 0 or step == settings.steps - 1:
                    record_terms(context, "search", step, {"loss": loss}, advice=ADVICE)
                task.advance(1, loss=loss)
                if (step + 1) % CHECKPOINT_EVERY == 0 or step == settings.steps - 1:
                    search.save(step + 1)
        return search.network.best()


class _Search:
    def __init__(self, teacher: Teacher, settings: SearchSettings, context: Context) -> None:
        policy = context.policy
        self.settings, self.context = settings, context
        # in a group the others are not here to keep anything with
        self.checkpoints = context.checkpoints if context.group.size == 1 else Checkpoints()
        self.classes = count_classes(teacher)
        self.network = policy.place(_SuperNetwork(self.classes, teacher.info.input_shape))
        self.objective = GeneratorObjective(
            teacher, self.network, settings.statistics_weight, policy
        )
        logits = [choice.logits for choice in self.network.choices()]
        known = {id(parameter) for parameter in logits}
        weights = [p for p in self.network.parameters() if id(p) not in known]
        self.weight_rule = torch.optim.Adam(weights, lr=settings.weight_lr, betas=(0.5, 0.999))
        self.logit_rule = torch.optim.Adam(logits, lr=settings.logit_lr, weight_decay=1e-3)

    def save(self, done: int) -> None:
        """Keep everything that the remaining steps depend on, unless it is damaged."""
        check_weights(self.network.parameters(), done - 1)
        parts = {"network": self.network.state_dict(), "random": generator_states()}
        state = flat(parts) | optimizer_state(self.weight_rule, "weights")
        state |= optimizer_state(self.logit_rule, "logits") | {"done": torch.tensor(done)}
        self.checkpoints.save("search", state)
        self.context.flush()

    def resume(self) -> int:
        """Take over the last checkpoint, if there is one; return the number of steps done."""
        state = self.checkpoints.load("search")
        if state is None:
            return 0
        self.network.load_state_dict(part_of(state, "network"))
        restore_optimizer(self.weight_rule, "weights", state)
        restore_optimizer(self.logit_rule, "logits", state)
        restore_generators(part_of(state, "random"))
        return int(state["done"])

    def step(self, step: int) -> Tensor:
        """Make one step of the weights and, after the warm-up, one of the logits."""
        settings = self.settings
        share = step / max(settings.steps - 1, 1)
        for choice in self.network.choices():
            choice.temperature = settings.hot * (settings.cold / settings.hot) ** share
        loss = self._descend(self.weight_rule)
        if share >= settings.warmup:
            self._descend(self.logit_rule, comparing=True)
        return loss

    def _descend(self, rule: torch.optim.Optimizer, *, comparing: bool = False) -> Tensor:
        choices = self.network.choices()
        for choice in choices:
            choice.comparing = comparing
        sample_choices(choices)
        labels = plain_labels(self.settings.batch, self.classes, self.context.policy.device)
        noise, soft = self.network.draw_noise(labels), labels.soft(self.classes)
        loss = self.objective(noise, labels.classes, labels.weights, soft)[0]
        self.weight_rule.zero_grad()
        self.logit_rule.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        rule.step()
        return loss.detach()
