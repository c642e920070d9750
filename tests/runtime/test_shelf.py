# SPDX-License-Identifier: Apache-2.0
"""Room for caches: in memory up to a budget, in files beyond it."""

import os

import pytest
import torch

from zsq.errors import RunError, UsageError
from zsq.runtime.amounts import parse_memory
from zsq.runtime.policy import Policy
from zsq.runtime.shelf import Shelf, describe, half_of_memory, host_budget


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8GB", 8 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("0.5gb", 5 * 10**8),
        ("1000000", 1000000),
        (1000, 1000),
    ],
)
def test_amounts_are_read_with_their_units(text, wanted):
    assert parse_memory(text) == wanted


def test_a_number_that_was_hardly_meant_as_bytes_is_refused():
    with pytest.raises(UsageError, match="'8' has no unit; write for example 8GB"):
        parse_memory("8")


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0", "0.0GB", "8 apples", "GB", -5, 0])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match="8GB"):
        parse_memory(text)


@pytest.mark.parametrize("budget", [10**9, 1])
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (7, 6)])
def test_a_tensor_behaves_alike_in_memory_and_in_a_file(tmp_path, budget, shape):
    shelf = Shelf(budget, tmp_path)
    assert shelf.in_files(shape) == (budget == 1)
    tensor, values = shelf.room(shape), torch.randn(shape)
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32
    tensor[:2].copy_(values[:2])
    tensor[2:].copy_(values[2:])
    assert torch.equal(tensor, values)
    chosen = torch.tensor([3, 0])
    assert torch.equal(tensor[chosen], values[chosen])
    if len(shape) == 4:
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert list(tmp_path.iterdir()) == [], "its file has no name, so a kill leaves nothing"


def test_the_budget_is_for_four_tensors():
    shelf = Shelf(4 * 4 * 1000)
    assert not shelf.in_files((10, 100))
    assert shelf.in_files((10, 101))


def test_the_pages_of_a_file_are_not_the_processs_own_memory(tmp_path):
    """Read from the system: anonymous memory does not grow by what lies in a file."""

    def anonymous():
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    before = anonymous()
    kept = Shelf(1, tmp_path).room((16_000_000,)).fill_(1.0)
    assert anonymous() - before < 16_000_000
    assert float(kept[-1]) == 1.0


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def full(handle, offset, length):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match="No space left"):
        Shelf(1, tmp_path).room((10, 10))
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_counts_what_is_alive_at_once():
    """Three tensors at a piece: two inputs and the target, or one input and two outputs."""
    text = describe(Shelf(10**12), [(1, 10**6), (1, 10**8), (1, 10**7)])
    assert "take up to 840.00 MB" in text  # 2 x 400 MB + 40 MB
    assert "all in memory" in text
    text = describe(Shelf(10**8), [], 10**9)  # layer by layer
    assert "take up to 1.00 GB" in text
    assert "in files as far as they do not fit" in text


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = host_budget(Policy(memory=8_000)), host_budget(Policy())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (host_budget(Policy(memory=8_000)), host_budget(Policy())) == (2_000, alone[1] // 4)
    assert alone == (8_000, half_of_memory())
