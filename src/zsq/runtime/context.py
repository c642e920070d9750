# SPDX-License-Identifier: Apache-2.0
"""What every long step is handed: how to compute, where to report, what to remember."""

from __future__ import annotations

from dataclasses import dataclass, field

from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.group import Group
from zsq.runtime.metrics import Records, Value
from zsq.runtime.policy import Policy
from zsq.runtime.progress import QuietReporter, Reporter


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
    """

    seed: int = 0
    policy: Policy = field(default_factory=Policy)
    reporter: Reporter = field(default_factory=QuietReporter)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    metrics: Records | None = None
    group: Group = field(default_factory=Group)

    def record(self, stage: str, step: int, **values: Value) -> None:
        """Write values over time, where a run keeps them."""
        if self.metrics is not None:
            self.metrics.write(stage=stage, step=step, **values)

    def flush(self) -> None:
        """Put what was recorded on disk; called at checkpoints."""
        if self.metrics is not None:
            self.metrics.flush()
