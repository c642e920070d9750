# SPDX-License-Identifier: Apache-2.0
"""Progress tells the truth, stays on stderr and never computes what it does not display."""

import io
import re
import sys

import pytest
import torch
from rich.console import Console

from zsq.runtime.progress import (
    BarReporter,
    PlainReporter,
    QuietReporter,
    make_reporter,
)
from zsq.runtime.tasks import duration


class Clock:
    """A clock that moves when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Loss:
    """A loss that counts how often it is looked at."""

    def __init__(self, value=0.0):
        self.value = value
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.value


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stream():
    return io.StringIO()


@pytest.fixture
def plain(stream, clock):
    return PlainReporter(stream, clock)


@pytest.fixture
def bars(stream, clock):
    return BarReporter(terminal(stream), clock)


def terminal(stream, width=100):
    return Console(file=stream, force_terminal=True, width=width, color_system=None)


def frames(stream):
    """Split what a terminal received into lines without control sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def fail_in_task(reporter, loss, steps=3):
    with reporter.task("block 2", total=10) as task:
        for _ in range(steps):
            task.advance(loss=loss)
        raise ZeroDivisionError


class TestPlain:
    def test_a_line_every_ten_seconds_and_one_at_the_end(self, plain, stream, clock):
        with plain.task("synthesis batch 1/8", total=50) as task:
            for step in range(50):
                clock.now += 0.5
                task.advance(loss=1.0 / (step + 1))
        assert stream.getvalue().splitlines() == [
            "synthesis batch 1/8: 20/50, 2.0 it/s, 0:15 left, loss 0.05",
            "synthesis batch 1/8: 40/50, 2.0 it/s, 0:05 left, loss 0.025",
            "synthesis batch 1/8: 50/50, 2.0 it/s, in 0:25, loss 0.02",
        ]

    def test_the_loss_is_evaluated_once_a_line(self, plain, stream, clock):
        loss = Loss(0.25)
        with plain.task("block 1", total=1000) as task:
            for _ in range(1000):
                clock.now += 0.1
                task.advance(loss=loss)
        assert loss.calls == len(stream.getvalue().splitlines()) == 10

    def test_the_first_step_does_not_count_for_the_rate(self, plain, stream, clock):
        with plain.task("compiled", total=10) as task:
            clock.now += 60.0
            task.advance()
            clock.now += 10.0
            task.advance(2)
        assert stream.getvalue().splitlines() == [
            "compiled: 1/10",
            "compiled: 3/10, 5.0 s/it, 0:35 left",
            "compiled: 3/10, 5.0 s/it, in 1:10",
        ]

    def test_steps_done_by_an_earlier_run_do_not_count_for_the_rate(self, plain, stream, clock):
        with plain.task("resumed", total=100, completed=80) as task:
            for _ in range(20):
                clock.now += 1.0
                task.advance()
        lines = stream.getvalue().splitlines()
        assert lines[0] == "resumed: 90/100, 1.0 it/s, 0:10 left"
        assert lines[-1] == "resumed: 100/100, 1.0 it/s, in 0:20"

    def test_a_task_of_one_step_has_a_rate(self, plain, stream, clock):
        with plain.task("one", total=1) as task:
            clock.now += 4.0
            task.advance()
        assert stream.getvalue() == "one: 1/1, 4.0 s/it, in 0:04\n"

    def test_a_failed_task_says_where_it_stopped_and_does_not_look_at_the_loss(self, plain, stream):
        loss = Loss()
        with pytest.raises(ZeroDivisionError):
            fail_in_task(plain, loss)
        assert stream.getvalue() == "block 2: stopped at 3/10, in 0:00\n"
        assert loss.calls == 0

    def test_notes_are_one_line_and_cannot_steer_a_terminal(self, plain, stream):
        plain.note("[red]first\nsecond\x1b[2J[/] héllo")
        assert stream.getvalue() == "[red]first second?[2J[/] héllo\n"

    def test_it_writes_to_stderr(self, capsys):
        PlainReporter().note("here")
        assert capsys.readouterr() == ("", "here\n")


class TestLoss:
    @pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.tensor([0.5]), lambda: 0.5])
    def test_numbers_tensors_and_functions_are_shown(self, plain, stream, value):
        with plain.task("t", total=1) as task:
            task.advance(loss=value)
        assert stream.getvalue().endswith("loss 0.5\n")

    def test_the_last_one_given_is_shown_even_if_later_steps_give_none(self, plain, stream):
        with plain.task("t", total=3) as task:
            task.advance(loss=1.0)
            task.advance(loss=2.0)
            task.advance()
        assert stream.getvalue().endswith("loss 2\n")

    def test_nan_is_shown(self, plain, stream):
        with plain.task("t", total=1) as task:
            task.advance(loss=float("nan"))
        assert stream.getvalue().endswith("loss nan\n")


class TestBars:
    def test_it_refreshes_at_most_four_times_a_second(self, bars, stream, clock):
        loss = Loss(0.125)
        with bars.task("synthesis", total=1000) as task:
            for _ in range(1000):
                clock.now += 0.01
                task.advance(loss=loss)
        # 10 seconds, and the last state.
        assert 35 <= loss.calls <= 41

    def test_it_shows_description_steps_rate_time_left_and_loss(self, bars, stream, clock):
        with bars.task("synthesis batch 1/8", total=100) as task:
            for _ in range(60):
                clock.now += 0.25
                task.advance(loss=0.125)
        shown = frames(stream)
        assert re.fullmatch(r"synthesis batch 1/8\s+(━+ )?0/100", shown[0])
        middle = next(line for line in shown if " 40/100" in line)
        assert middle.endswith("40/100, 4.0 it/s, 0:15 left, loss 0.125")
        assert shown[-1].endswith("60/100, 4.0 it/s, in 0:15, loss 0.125")

    def test_the_last_state_stays_on_the_screen(self, bars, stream):
        with bars.task("t", total=2) as task:
            task.advance(2, loss=3.0)
        assert stream.getvalue().rstrip("\x1b[?25h").endswith("\n")
        assert "2/2" in frames(stream)[-1]
        assert frames(stream)[-1].endswith("loss 3")

    def test_inner_tasks_share_the_screen_and_vanish(self, bars, stream):
        with bars.task("network", total=2) as outer:
            for name in ("first", "second"):
                with bars.task(f"{name} block", total=1) as inner:
                    inner.advance()
                outer.advance()
        shown = frames(stream)
        assert any("first block" in line for line in shown)
        assert any("second block" in line for line in shown)
        assert shown[-1].startswith("network")
        assert "2/2" in shown[-1]

    def test_it_can_be_used_again_and_shows_the_cursor_after_a_failure(self, bars, stream):
        loss = Loss()
        with pytest.raises(ZeroDivisionError):
            fail_in_task(bars, loss)
        assert loss.calls == 0
        assert "3/10" in frames(stream)[-1]
        assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
        with bars.task("again", total=1) as task:
            task.advance()
        assert "again" in frames(stream)[-1]

    def test_a_loss_that_fails_ends_the_task_and_shows_the_cursor(self, bars, stream):
        def broken():
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), bars.task("t", total=2) as task:
            task.advance(loss=broken)
        assert stream.getvalue().count("\x1b[?25h") == 1

    def test_markup_in_descriptions_and_notes_is_shown_as_it_is(self, bars, stream):
        with bars.task("[bold]net[/bold]\x1b[2J", total=1):
            bars.note("weights of [/red] \\[x] are\n99 % zero")
        shown = frames(stream)
        assert any(line.startswith("[bold]net[/bold]?[2J") for line in shown)
        assert "weights of [/red] \\[x] are 99 % zero" in shown

    def test_a_long_note_is_not_broken_into_lines(self, bars, stream):
        bars.note("word " * 60)
        assert len(frames(stream)) == 1

    def test_results_printed_while_a_bar_is_live_go_to_stdout(self, bars, stream, capsys):
        with bars.task("t", total=1):
            print("result")
        assert capsys.readouterr().out == "result\n"
        assert "result" not in stream.getvalue()

    def test_an_empty_task_can_be_shown(self, bars, stream):
        with bars.task("nothing to do", total=0):
            pass
        assert "0/0" in frames(stream)[-1]


class TestQuiet:
    def test_nothing_is_printed_or_evaluated(self, capsys):
        reporter = make_reporter("quiet")
        loss = Loss()
        with reporter.task("t", total=5) as task:
            for _ in range(5):
                task.advance(loss=loss)
        reporter.note("nobody reads this")
        assert task.done == 5
        assert loss.calls == 0
        assert capsys.readouterr() == ("", "")


class TestChoice:
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def test_quiet(self):
        assert isinstance(make_reporter("quiet"), QuietReporter)

    def test_a_file_gets_lines_even_if_colours_are_forced(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert isinstance(make_reporter("auto"), PlainReporter)

    def test_a_terminal_gets_bars(self, monkeypatch):
        stderr = self.Terminal()
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        reporter = make_reporter("auto")
        assert isinstance(reporter, BarReporter)
        with reporter.task("on stderr", total=1) as task:
            print("careful", file=sys.stderr)
            task.advance()
        assert "on stderr" in stderr.getvalue()
        assert "careful" in stderr.getvalue()

    def test_a_terminal_that_cannot_move_the_cursor_gets_lines(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", self.Terminal())
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(make_reporter("auto"), PlainReporter)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (600, "10:00"), (3599.6, "1:00:00"), (360_000, "100:00:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class OnAGpu:
    """A loss that a GPU holds, as far as a task can tell."""

    is_cuda = True

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __float__(self):
        self.calls += 1
        return self.value


def test_a_loss_that_a_gpu_holds_is_read_every_fifty_steps_at_most():
    clock, stream = Clock(), io.StringIO()
    losses = [OnAGpu(float(step)) for step in range(120)]
    with PlainReporter(stream, clock).task("tune", 120) as task:
        for loss in losses:
            clock.now += 100.0  # every step is shown
            task.advance(1, loss=loss)
    read = [step for step, loss in enumerate(losses) if loss.calls]
    assert read == [0, 50, 100, 119]
    lines = stream.getvalue().splitlines()
    assert "loss 0" in lines[40]
    assert "loss 50" in lines[60]
    assert "loss 119" in lines[-1]


def test_a_loss_that_is_here_is_read_whenever_it_is_shown():
    clock, stream = Clock(), io.StringIO()
    with PlainReporter(stream, clock).task("tune", 5) as task:
        for step in range(5):
            clock.now += 100.0
            task.advance(1, loss=torch.tensor(float(step)))
    found = re.findall(r"loss (\d)", stream.getvalue())
    assert found == ["0", "1", "2", "3", "4", "4"]
