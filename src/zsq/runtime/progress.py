# SPDX-License-Identifier: Apache-2.0
"""Progress of long steps, on stderr; stdout belongs to results.

A terminal gets a live bar, anything else (a log file, a CI job) a line now and then, and scripts
that asked for quiet get nothing. Only what is displayed is ever computed: a training loop can hand
over its loss at every step without waiting for the device at every step.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from zsq.errors import one_line
from zsq.runtime.tasks import Task

BAR_PERIOD = 0.25
"""Seconds between two refreshes of a live bar, at least."""

LINE_PERIOD = 10.0
"""Seconds between two lines of a task where there is no terminal, at least."""


class Reporter(ABC):
    """Where progress is reported; :func:`make_reporter` chooses one."""

    @contextmanager
    def task(self, description: str, total: int, *, completed: int = 0) -> Iterator[Task]:
        """Report on a long step for as long as the block runs. Tasks may be nested.

        Args:
            description: what is done, in a few words.
            total: number of steps.
            completed: number of steps already done when the block begins (a resumed run).

        Yields:
            The task; call its ``advance`` after each step.
        """
        task = self._open(description, total, completed)
        succeeded = False
        try:
            yield task
            succeeded = True
        finally:
            self._close(task, succeeded)

    @abstractmethod
    def note(self, message: str) -> None:
        """Print one line that is worth keeping, whatever is displayed at the moment.

        Args:
            message: plain text; markup and control characters in it have no effect.
        """

    @abstractmethod
    def _open(self, description: str, total: int, completed: int) -> Task:
        """Begin a task."""

    @abstractmethod
    def _close(self, task: Task, succeeded: bool) -> None:
        """End a task. After a failure the loss must not be evaluated: the device may be lost."""


class QuietReporter(Reporter):
    """Reports nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def _open(self, description: str, total: int, completed: int) -> Task:
        return Task(description, total, completed, _no_clock, 1.0, _show_nothing)

    def _close(self, task: Task, succeeded: bool) -> None:
        pass


class PlainReporter(Reporter):
    """Prints a line about every ten seconds, and one at the end of each task.

    Args:
        stream: where to; ``sys.stderr`` unless given.
        clock: seconds, from any origin.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._clock = clock

    def note(self, message: str) -> None:
        """Print one line."""
        print(one_line(message), file=self._stream or sys.stderr, flush=True)

    def _open(self, description: str, total: int, completed: int) -> Task:
        return Task(description, total, completed, self._clock, LINE_PERIOD, self._show)

    def _show(self, task: Task) -> None:
        self.note(f"{task.description}: {task.facts()}")

    def _close(self, task: Task, succeeded: bool) -> None:
        if succeeded:
            self.note(f"{task.description}: {task.facts(finished=True)}")
        else:
            self.note(
                f"{task.description}: stopped at {task.facts(finished=True, with_loss=False)}"
            )


class BarReporter(Reporter):
    """Draws live bars on a terminal.

    The bars are redrawn by ``advance`` and by nothing else: a thread of their own would evaluate
    losses while the next step is running.

    Args:
        console: the terminal; the one that stderr is connected to unless given.
        clock: seconds, from any origin.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._progress: Progress | None = None
        self._bars: dict[Task, TaskID] = {}

    def note(self, message: str) -> None:
        """Print one line above the bars."""
        self._console.print(Text(one_line(message)), highlight=False, soft_wrap=True)

    def _open(self, description: str, total: int, completed: int) -> Task:
        if self._progress is None:
            self._progress = self._start()
        task = Task(description, total, completed, self._clock, BAR_PERIOD, self._show)
        self._bars[task] = self._progress.add_task(
            task.description, total=total, completed=completed, facts=f"{completed}/{total}"
        )
        self._progress.refresh()
        return task

    def _start(self) -> Progress:
        """Begin to draw."""
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,  # results must not end up on stderr
        )
        progress.start()
        return progress

    def _show(self, task: Task) -> None:
        self._draw(task, task.facts())

    def _draw(self, task: Task, facts: str) -> None:
        if self._progress is not None:
            self._progress.update(self._bars[task], completed=task.done, facts=facts, refresh=True)

    def _close(self, task: Task, succeeded: bool) -> None:
        try:
            self._draw(task, task.facts(finished=True, with_loss=succeeded))
        finally:
            self._remove(task)

    def _remove(self, task: Task) -> None:
        """Forget a bar. The last one to end stays on the screen; those within it vanish."""
        bar = self._bars.pop(task)
        if self._progress is None:
            return
        if self._bars:
            self._progress.remove_task(bar)
            self._progress.refresh()
        else:
            self._progress.stop()
            self._progress = None


def make_reporter(mode: Literal["auto", "quiet"] = "auto") -> Reporter:
    """Choose how to report progress.

    Args:
        mode: ``"auto"``: live bars if stderr is a terminal, else a line now and then.
            ``"quiet"``: nothing.

    Returns:
        The reporter.

    Example:
        >>> reporter = make_reporter("quiet")
        >>> with reporter.task("synthesis batch 1/8", total=500) as task:
        ...     for step in range(500):
        ...         task.advance(loss=1 / (step + 1))
        >>> task.done
        500
    """
    if mode == "quiet":
        return QuietReporter()
    console = Console(stderr=True)
    # Not console.is_terminal: FORCE_COLOR, common in CI, makes that true for a file.
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        return BarReporter(console)
    return PlainReporter()


def _no_clock() -> float:
    return 0.0


def _show_nothing(task: Task) -> None:
    pass
