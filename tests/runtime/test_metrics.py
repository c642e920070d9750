# SPDX-License-Identifier: Apache-2.0
"""Metrics survive kills, and damage is reported."""

import contextlib
import errno
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq.errors import RunError, UsageError
from zsq.runtime.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def fill(path, steps):
    with MetricsLog(path) as log:
        for step in steps:
            log.write(stage="synthesis", step=step, loss=0.5 * step)


def steps_in(path):
    return [record["step"] for record in read_metrics(path)]


def test_each_line_is_a_json_object_with_time_stage_step_and_values(path):
    before = time.time()
    with MetricsLog(path) as log:
        log.write(stage="reconstruction", step=7, loss=0.125, block="layer1.0", frozen=True)
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert list(record) == ["time", "stage", "step", "loss", "block", "frozen"]
    assert before - 0.01 <= record.pop("time") <= time.time() + 0.01
    expected = {"stage": "reconstruction", "step": 7, "loss": 0.125}
    assert record == expected | {"block": "layer1.0", "frozen": True}
    assert read_metrics(path)[0] == json.loads(line)


def test_reopening_appends(path):
    fill(path, [1, 2])
    fill(path, [2, 3])
    assert steps_in(path) == [1, 2, 2, 3]


def test_flush_makes_the_records_visible_to_others(path):
    log = MetricsLog(path)
    log.write(stage="synthesis", step=1)
    log.flush()
    assert steps_in(path) == [1]
    log.close()
    log.close()


def test_numbers_that_are_not_finite_are_null_and_the_file_stays_json(path):
    with MetricsLog(path) as log:
        log.write(stage="s", step=0, a=float("nan"), b=float("-inf"), c=1e300)

    def refuse(name):
        raise AssertionError(name)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == (None, None, 1e300)


# 5000 characters: a torn line that is longer than the pieces in which the tail is searched.
@pytest.mark.parametrize("length", [1, 20, 5000])
def test_a_torn_last_line_is_dropped_on_reading_and_removed_on_reopening(path, length):
    fill(path, [1, 2])
    whole = path.read_bytes()
    line = json.dumps({"time": 0, "stage": "s", "step": 3, "text": "x" * 6000}).encode()
    path.write_bytes(whole + line[:length])
    assert steps_in(path) == [1, 2]
    MetricsLog(path).close()
    assert path.read_bytes() == whole
    fill(path, [3])
    assert steps_in(path) == [1, 2, 3]


@given(cut=st.integers(min_value=0))
def test_wherever_the_file_is_cut_the_whole_lines_remain(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    fill(path, range(5))
    content = path.read_bytes()
    kept = content[: cut % (len(content) + 1)]
    path.write_bytes(kept)
    whole = kept.count(b"\n")
    fill(path, [99])
    assert steps_in(path) == [*range(whole), 99]


def test_a_file_without_any_whole_line_starts_over(path):
    path.write_bytes(b"x" * 10_000)
    fill(path, [1])
    assert steps_in(path) == [1]


@pytest.mark.parametrize("damage", [b"{]\n", b"17\n", b"\n", b"\xff\xfe\n"])
def test_damage_before_the_last_line_names_the_line(path, damage):
    fill(path, [1])
    with path.open("ab") as file:
        file.write(damage)
    fill(path, [2])
    with pytest.raises(UsageError, match=r"line 2 of .*metrics\.jsonl is not a JSON object"):
        read_metrics(path)


def test_a_missing_file_is_a_usage_error(path):
    with pytest.raises(UsageError, match=r"metrics\.jsonl: No such file"):
        read_metrics(path)


def test_a_folder_that_does_not_exist_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="cannot write"):
        MetricsLog(tmp_path / "missing" / "metrics.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
class TestFullDisk:
    """/dev/full refuses every write with ENOSPC, as a full disk does."""

    def open_on_full_disk(self, path):
        path.symlink_to("/dev/full")
        # The device has no length, so there is no last line to look for.
        return MetricsLog(path)

    def test_flush_is_a_run_error(self, path):
        log = self.open_on_full_disk(path)
        log.write(stage="s", step=1)
        with pytest.raises(RunError, match=f"{os.strerror(errno.ENOSPC)}.*--resume"):
            log.flush()
        with pytest.raises(RunError):
            log.close()

    def test_leaving_the_block_is_a_run_error(self, path):
        with pytest.raises(RunError, match="No space"), self.open_on_full_disk(path) as log:
            log.write(stage="s", step=1)

    def test_it_does_not_hide_the_error_that_ended_the_block(self, path):
        def write_and_fail():
            with self.open_on_full_disk(path) as log:
                log.write(stage="s", step=1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write_and_fail()

    def test_write_is_a_run_error_once_the_buffer_is_full(self, path):
        log = self.open_on_full_disk(path)
        with pytest.raises(RunError, match="No space"):
            log.write(stage="s", step=1, text="x" * 100_000)
        with contextlib.suppress(RunError):
            log.close()
