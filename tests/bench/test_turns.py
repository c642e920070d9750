# SPDX-License-Identifier: Apache-2.0
"""Timing in turns, and what is watched meanwhile."""

import time

import pytest
import torch

from zsq.bench.memory import PeakMemory
from zsq.bench.peak import matmul_peak
from zsq.bench.turns import WARM_UP, EnoughError, TickingReporter, Turns

CPU = torch.device("cpu")


def endless(turns, loop, steps=1):
    while True:
        loop()
        turns.tick(steps)


def measured(turns, loop, steps=1):
    with pytest.raises(EnoughError):
        endless(turns, loop, steps)
    return turns.times


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def test_times_are_those_of_a_step_whatever_the_length_of_a_turn():
    for steps in (6, 20):
        turns = Turns(steps, {"bare": lambda: sleeper(0.002)}, CPU, PeakMemory(CPU))
        times = measured(turns, sleeper(0.004))
        assert 0.004 <= times.median() < 0.016
        assert 0.002 <= times.median("bare") < 0.008
        assert len(times.loop) == len(times.rivals["bare"]) == steps // turns.turn


def test_the_loop_makes_the_steps_asked_for_and_rivals_come_after_its_warm_up():
    log = []

    def rival():
        log.append("rival")
        return lambda: log.append("bare")

    turns = Turns(7, {"bare": rival}, CPU, PeakMemory(CPU), skip=3)
    measured(turns, lambda: log.append("loop"))
    assert log.count("loop") == 3 + WARM_UP + 7
    assert log[: 3 + WARM_UP] == ["loop"] * (3 + WARM_UP)
    assert log[3 + WARM_UP] == "rival"
    after = log[3 + WARM_UP + 1 + WARM_UP :]
    assert after == ["loop", "bare"] * 7


def test_a_loop_that_reports_several_steps_at_once_is_timed_a_step():
    turns = Turns(20, {}, CPU, PeakMemory(CPU))
    assert 0.002 <= measured(turns, sleeper(0.008), 4).median() < 0.007


def test_a_reporter_passes_steps_and_notes_on():
    steps, notes = [], []
    reporter = TickingReporter(steps.append, notes.append)
    with reporter.task("work", 5) as task:
        task.advance(1, loss=torch.tensor(1.0))
        task.advance(2)
    reporter.note("compilation failed")
    assert (steps, notes) == ([1, 2], ["compilation failed"])


def test_peak_memory_sees_what_a_loop_held_and_forgets_what_came_before():
    memory = PeakMemory(CPU)
    if memory.peak() is None:
        pytest.skip("this system does not tell the resident memory of a process")
    size = 200_000_000
    held = torch.ones(size, dtype=torch.uint8)
    assert memory.peak() > 0.9 * size
    del held
    memory.restart()
    assert memory.peak() < 0.5 * size


def test_the_peak_is_that_of_the_best_product():
    found = matmul_peak(CPU, torch.float32, side=256, repeats=3)
    a = torch.randn(256, 256)
    torch.mm(a, a)
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a)
    once = 10 * 2 * 256**3 / (time.perf_counter() - start)
    assert 0.5 * once < found < 20 * once
    assert not torch.backends.cuda.matmul.allow_tf32
