# SPDX-License-Identifier: Apache-2.0
"""A long step that is under way: what is done, how fast, how long it will take, the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsFloat

from zsq.errors import one_line

#: Steps between two looks at a loss that a GPU holds.
LOSS_EVERY = 50
Loss = SupportsFloat | Callable[[], float]
"""A number, a one-element tensor, or a function that returns a number."""


class Task:
    """A step that is under way; :meth:`zsq.runtime.progress.Reporter.task` makes it.

    Args:
        description: what is done.
        total: number of steps.
        completed: number of steps that were done before, by the run that is being resumed.
        clock: seconds, from any origin.
        period: seconds between two displays, at least.
        show: displays the task; :meth:`advance` calls it.
    """

    def __init__(
        self,
        description: str,
        total: int,
        completed: int,
        clock: Callable[[], float],
        period: float,
        show: Callable[[Task], None],
    ) -> None:
        self.description = one_line(description)
        self.total = total
        self.done = completed
        self._clock = clock
        self._period = period
        self._show = show
        self._loss: Loss | None = None
        # At which step the loss was read last, and what it was.
        self._read: tuple[int, float] | None = None
        self._began = clock()
        self._due = self._began + period
        # Where the rate is counted from: (steps done, time).
        self._origin = (completed, self._began)
        self._warming_up = True

    def advance(self, n: int = 1, loss: Loss | None = None) -> None:
        """Count ``n`` steps as done.

        Args:
            n: number of steps.
            loss: the loss of the last of them. It is evaluated only when it is displayed, which
                may be later, so a tensor should be detached. The last one given is displayed.
        """
        self.done += n
        if loss is not None:
            self._loss = loss
        now = self._clock()
        if self._warming_up:
            # The first step often compiles; counting it would spoil the rate for minutes.
            self._warming_up = False
            if self.done < self.total:
                self._origin = (self.done, now)
        if now >= self._due:
            self._due = now + self._period
            self._show(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the task began."""
        return self._clock() - self._began

    @property
    def rate(self) -> float | None:
        """Steps a second, without the first one; None as long as nothing is known."""
        steps, since = self._origin
        seconds = self._clock() - since
        return (self.done - steps) / seconds if self.done > steps and seconds > 0 else None

    def loss_value(self, *, newest: bool = True) -> float | None:
        """Evaluate the last loss. This may wait for the device.

        Args:
            newest: whatever that costs; else one that a GPU holds is read every 50 steps at most, and what
                was read before is good enough in between.
        """
        if self._loss is None:
            return None
        waits = getattr(self._loss, "is_cuda", False)
        if waits and not newest and self._read and self.done - self._read[0] < LOSS_EVERY:
            return self._read[1]
        value = float(self._loss() if callable(self._loss) else self._loss)
        self._read = (self.done, value)
        return value

    def facts(self, *, finished: bool = False, with_loss: bool = True) -> str:
        """Describe the state in one line: steps, rate, time left or taken, loss.

        Args:
            finished: give the time taken instead of the time left.
            with_loss: evaluate the loss.
        """
        parts = [f"{self.done}/{self.total}"]
        rate = self.rate
        if rate is not None:
            parts.append(f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it")
        if finished:
            parts.append(f"in {duration(self.elapsed)}")
        elif rate is not None:
            parts.append(f"{duration(max(0, self.total - self.done) / rate)} left")
        loss = self.loss_value(newest=finished) if with_loss else None
        if loss is not None:
            parts.append(f"loss {loss:.4g}")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Write a number of seconds as ``m:ss`` or ``h:mm:ss``.

    Example:
        >>> duration(65.4), duration(3725)
        ('1:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
