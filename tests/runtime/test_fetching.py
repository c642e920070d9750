# SPDX-License-Identifier: Apache-2.0
"""Rows of a tensor on their way to the device that computes."""

import pytest
import torch

from zsq.runtime import fetching
from zsq.runtime.fetching import Fetcher


class Waits:
    """An event that counts who waits for it."""

    def __init__(self):
        self.recorded = self.waited = 0

    def record(self):
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
