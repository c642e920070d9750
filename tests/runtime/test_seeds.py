# SPDX-License-Identifier: Apache-2.0
"""Streams of random numbers that depend on their name only."""

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsq.errors import UsageError
from zsq.runtime.context import Context
from zsq.runtime.seeds import derive_seed, seeded

parts = st.lists(st.integers() | st.text(), max_size=4)


def draw(*name):
    with seeded(*name):
        return torch.randn(8)


def test_the_seed_is_the_first_63_bits_of_the_sha256_of_the_json_text():
    digest = hashlib.sha256(b'[0,"synthesis",3]').hexdigest()
    assert derive_seed(0, "synthesis", 3) == int(digest[:16], 16) // 2


@given(parts)
def test_seeds_fit_63_bits_and_torch_accepts_them(names):
    seed = derive_seed(*names)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


@given(parts, parts)
def test_seeds_are_equal_exactly_when_the_parts_are(first, second):
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


def test_types_order_and_borders_of_the_parts_count():
    names = [(1,), ("1",), (1, 2), (2, 1), (12,), ("a", "bc"), ("ab", "c"), ("abc",), ()]
    assert len({derive_seed(*name) for name in names}) == len(names)


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_the_seed_is_the_same_in_another_process(hash_seed):
    code = "from zsq.runtime.seeds import derive_seed; print(derive_seed(3, 'block', 'é'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert int(result.stdout) == derive_seed(3, "block", "é")


def test_the_same_name_draws_the_same_and_other_names_draw_other_numbers():
    assert torch.equal(draw(0, "a"), draw(0, "a"))
    streams = [draw(*name) for name in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0)]]
    for first, second in itertools.combinations(streams, 2):
        assert not torch.equal(first, second)


def test_what_is_drawn_does_not_depend_on_what_ran_before():
    first = draw(0)
    torch.randn(1000)
    assert torch.equal(draw(0), first)


def test_the_generator_outside_goes_on_as_if_the_block_had_not_run():
    torch.manual_seed(5)
    uninterrupted = torch.randn(6)
    torch.manual_seed(5)
    before = torch.randn(3)
    draw(0)
    assert torch.equal(torch.cat([before, torch.randn(3)]), uninterrupted)


def test_the_generator_is_restored_after_an_error_too():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(0):
        torch.randn(3).numel() // 0
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_can_be_nested():
    with seeded(0):
        first = torch.randn(2)
        inner = draw(1)
        second = torch.randn(2)
    with seeded(0):
        assert torch.equal(torch.randn(4), torch.cat([first, second]))
    assert torch.equal(inner, draw(1))


@pytest.mark.gpu
def test_cuda_devices_are_seeded_and_restored():
    def draw_on_gpus():
        with seeded(0, "gpu"):
            return [torch.randn(4, device=f"cuda:{i}") for i in range(torch.cuda.device_count())]

    torch.cuda.manual_seed_all(1)
    states = torch.cuda.get_rng_state_all()
    first, second = draw_on_gpus(), draw_on_gpus()
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, states, torch.cuda.get_rng_state_all()))


def test_seeds_are_whole_numbers_of_any_library():
    for seed in (7, np.int64(7), torch.tensor(7)):
        assert Context(seed=seed).within("part").seed == derive_seed(7, "part")
    for wrong in (None, 7.5, "7"):
        with pytest.raises(UsageError, match=f"seed={wrong!r} is no whole number"):
            Context(seed=wrong)
