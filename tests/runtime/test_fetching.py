# SPDX-License-Identifier: Apache-2.0
"""Rows of a tensor on their way to the device that computes."""

import re
import sys
from pathlib import Path

import pytest
import torch

from zsq.runtime import fetching
from zsq.runtime.fetching import Fetcher
from zsq.runtime.shelf import Shelf


class Waits:
    """An event that counts who waits for it."""

    def __init__(self):
        self.recorded = self.waited = 0

    def record(self, stream):
        assert stream == "of cpu"
        self.recorded += 1

    def synchronize(self):
        self.waited += 1


@pytest.mark.parametrize("shape", [(7, 3, 4, 5), (7, 6)])
def test_rows_come_through_buffers_in_turn(shape, monkeypatch):
    source = torch.randn(shape)
    if source.ndim == 4:
        source = source.contiguous(memory_format=torch.channels_last)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **more: empty(*a, **more))
    # copies are of the stream of the device that computes, which need not be the current one
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    fetcher = Fetcher(source, 3, torch.device("cpu"))
    assert torch.equal(fetcher.fetch(torch.tensor([6, 0])), source[[6, 0]])
    fetcher.buffers = [fetching._pinned(source[:1], 3) for _ in range(2)]
    fetcher.copied = [Waits(), Waits()]
    for step in range(5):
        rows = torch.randperm(7)[: 3 - step % 2]
        before = fetcher.turn
        assert torch.equal(fetcher.fetch(rows), source[rows])
        assert fetcher.turn != before
    assert [event.recorded for event in fetcher.copied] == [2, 3]
    assert [event.waited for event in fetcher.copied] == [2, 3]
    assert fetcher.buffers[0].stride()[1:] == source.stride()[1:], "batches keep the memory order"


def resident(name):
    """Return the bytes of this process's mapping of a file that are in memory."""
    text = Path("/proc/self/smaps").read_text()
    found = re.search(rf"{re.escape(name)}[^\n]*\n(?:.*\n)*?Rss:\s+(\d+) kB", text)
    return 1024 * int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("shape", [(64, 16, 64, 32), (64, 3, 100, 100), (64, 5000)])
def test_rows_in_a_file_are_in_memory_before_they_are_fetched(tmp_path, shape):
    source = Shelf(budget=0, folder=tmp_path).room(shape)
    name = source.untyped_storage().filename
    fetcher = Fetcher(source, 8, torch.device("cpu"))
    before = resident(name)
    rows = torch.randperm(len(source))[:8]
    fetcher.read_ahead(rows)
    fetcher.reader.join()
    size = 4 * source[0].numel()
    assert resident(name) - before >= 8 * size
    assert torch.equal(fetcher.fetch(rows), source[rows])


def test_nothing_is_read_ahead_of_what_is_in_memory_or_while_reading(tmp_path):
    fetcher = Fetcher(torch.randn(4, 3), 2, torch.device("cpu"))
    fetcher.read_ahead(torch.tensor([1]))
    assert fetcher.reader is None
    fetcher = Fetcher(Shelf(budget=0, folder=tmp_path).room((4, 3)), 2, torch.device("cpu"))

    class Busy:
        def is_alive(self):
            return True

    fetcher.reader = busy = Busy()
    fetcher.read_ahead(torch.tensor([1]))
    assert fetcher.reader is busy
