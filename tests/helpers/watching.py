# SPDX-License-Identifier: Apache-2.0
"""A stretch of a loop, watched from one step to another."""

from contextlib import ExitStack

#: Every loop reads its loss in its first step and not again for at least 50.
STEADY, WATCHED = 10, 30


class WatchedError(Exception):
    """Ends a loop that has been watched."""


def watch(drive, skip, watching):
    """Run a loop to its steady state, then `WATCHED` steps within a context, and end it.

    Args:
        drive: runs the loop, calling a function after each step.
        skip: steps before the loop is what is to be watched.
        watching: the context; left before the loop ends.
    """
    steps, begun = 0, False

    def tick(count):
        nonlocal steps, begun
        steps += count
        if steps >= skip + STEADY + WATCHED:
            stack.close()
            raise WatchedError
        if steps >= skip + STEADY and not begun:
            begun = True
            stack.enter_context(watching)

    with ExitStack() as stack:
        try:
            drive(tick)
        except WatchedError:
            return
    raise AssertionError("the loop ended before it was watched")
