# SPDX-License-Identifier: Apache-2.0
"""A loop and its rivals, timed in turns, so that all of them see the same machine.

A loop belongs to the code that is measured: it runs by itself and only says when a step is done.
Between two of its steps the clock stops and the rivals have their turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from zsq.bench.memory import PeakMemory
from zsq.runtime.policy import synchronize
from zsq.runtime.progress import QuietReporter
from zsq.runtime.tasks import Task

#: Steps that a loop makes before it is timed: compilation, graph capture, first allocations.
WARM_UP = 5
#: Steps in a turn where there are enough of them.
TURN = 5

Tick = Callable[[int], None]


class EnoughError(Exception):
    """Ends a loop that has been measured."""


@dataclass
class Times:
    """Seconds a step, one entry per turn."""

    loop: list[float] = field(default_factory=list)
    rivals: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None

    def median(self, rival: str | None = None) -> float:
        """Return the median seconds of a step, of the loop or of a rival."""
        return statistics.median(self.loop if rival is None else self.rivals[rival])


class Turns:
    """Takes the time of a loop that calls `tick`, and of its rivals.

    Args:
        steps: of the loop to time; ended by `EnoughError` then.
        rivals: functions that prepare a rival and return its step. They are called after the
            loop's warm-up, so that its memory is its own.
        device: waited for at both ends of a turn.
        memory: watched over the loop's warm-up, without the first step, which may compile.
        skip: ticks before the loop is what is to be measured.
    """

    def __init__(
        self, steps: int, rivals: dict[str, Callable[[], Callable[[], object]]], device: torch.device,
        memory: PeakMemory, skip: int = 0,
    ) -> None:  # fmt: skip
        self.turn = max(1, min(TURN, steps // 5))
        self.left, self.device, self.memory = steps, device, memory
        self.prepare, self.rivals = rivals, dict[str, Callable[[], object]]()
        self.skip, self.warm, self.done = skip, skip + WARM_UP, 0
        self.mark, self.since = 0.0, 0
        self.times = Times()

    def tick(self, count: int = 1) -> None:
        """Take note that the loop has made steps.

        Raises:
            EnoughError: the loop has made as many as were asked for.
        """
        self.done += count
        if self.done <= self.warm:
            self._warm_up()
            return
        self.since += count
        if self.since < min(self.turn, self.left):
            return
        synchronize(self.device)
        self.times.loop.append((time.perf_counter() - self.mark) / self.since)
        for name, step in self.rivals.items():
            self.times.rivals.setdefault(name, []).append(self._time(step, self.turn))
        self.left -= self.since
        if self.left <= 0:
            raise EnoughError
        self._start()

    def _warm_up(self) -> None:
        synchronize(self.device)
        if self.done == self.skip + 1:
            self.memory.restart()
        if self.done == self.warm:
            self.times.peak_bytes = self.memory.peak()
            for name, prepare in self.prepare.items():
                self.rivals[name] = prepare()
                self._time(self.rivals[name], WARM_UP)
            self._start()

    def _start(self) -> None:
        synchronize(self.device)
        self.mark, self.since = time.perf_counter(), 0

    def _time(self, step: Callable[[], object], repeats: int) -> float:
        """Return the seconds of a call."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize(self.device)
        return (time.perf_counter() - start) / repeats


class TickingReporter(QuietReporter):
    """Hands the progress of a loop to `tick`, and its notes on.

    Args:
        tick: called after each step.
        note: told what the loop notes, such as a compilation that failed.
    """

    def __init__(self, tick: Tick, note: Callable[[str], None]) -> None:
        self.tick, self.hand_on = tick, note

    def note(self, message: str) -> None:
        """Hand a note on."""
        self.hand_on(message)

    def _open(self, description: str, total: int, completed: int) -> Task:
        return _TickingTask(self.tick, total)


class _TickingTask(Task):
    def __init__(self, tick: Tick, total: int) -> None:
        super().__init__("", total, 0, lambda: 0.0, 1.0, lambda task: None)
        self.tick = tick

    def advance(self, n: int = 1, loss: object = None) -> None:
        """Pass the step on; the loss is not read."""
        self.tick(n)
