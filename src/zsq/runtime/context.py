# SPDX-License-Identifier: Apache-2.0
"""What every long step is handed: how to compute, where to report, what to remember."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.group import Group
from zsq.runtime.metrics import Records, Value
from zsq.runtime.policy import Policy
from zsq.runtime.progress import QuietReporter, Reporter
from zsq.runtime.seeds import derive_seed, whole_seed


@dataclass(frozen=True)
class Context:
    """The surroundings of a run.

    Attributes:
        seed: every random draw derives from it and from the name of the step that draws.
        policy: device, precision, compilation.
        reporter: progress and notes.
        checkpoints: finished pieces.
        metrics: values over time; None keeps none.
        group: the processes that share the run.
        part: of a step that is done in parts, the one that this is for; named in records.

    Raises:
        UsageError: the seed is no whole number.
    """

    seed: int = 0
    policy: Policy = field(default_factory=Policy)
    reporter: Reporter = field(default_factory=QuietReporter)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    metrics: Records | None = None
    group: Group = field(default_factory=Group)
    part: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_seed(self.seed))

    def within(self, part: str) -> Context:
        """Return the surroundings of a part of a step: chance, checkpoints and records of its own."""
        return replace(
            self,
            part=part,
            seed=derive_seed(self.seed, part),
            checkpoints=self.checkpoints.within(part),
        )

    def record(self, stage: str, step: int, **values: Value) -> None:
        """Write values over time, where a run keeps them."""
        if self.metrics is not None:
            self.metrics.write(stage=f"{stage} {self.part}".strip(), step=step, **values)

    def begin_stream(self, step: str, done: int) -> None:
        """Let processes that keep no state of chance draw what they will when resumed from here.

        Args:
            step: what draws.
            done: how much of it is done; a checkpoint was just saved or loaded.
        """
        if self.group.stream:
            torch.manual_seed(derive_seed(self.seed, step, *self.group.stream, done))

    def flush(self) -> None:
        """Put what was recorded on disk; called at checkpoints."""
        if self.metrics is not None:
            self.metrics.flush()
