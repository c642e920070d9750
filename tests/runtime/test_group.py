# SPDX-License-Identifier: Apache-2.0
"""What several processes do together, against what one does alone."""

import pytest
import torch
from helpers import ranks

from zsq.errors import UsageError
from zsq.runtime.group import Group


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of all jobs, done by two processes."""
    target = tmp_path_factory.mktemp("ranks")
    done = ranks.launch(2, [ranks.__file__], target)
    assert done.returncode == 0, done.stderr
    return target


def both(folder, job):
    """Return what two processes and what one got."""
    first, second = (ranks.results(folder, job.__name__, rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    return first, second, ranks.alone(job)


def same(first, second):
    differing = [k for k in first if not torch.equal(first[k], second[k])]
    assert not differing


def close(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=tolerance, atol=tolerance, msg=key)


def test_operations(folder):
    first, second, one = both(folder, ranks.operations)
    same(first, second)
    last = {"from_last"}
    close({k: v for k, v in first.items() if k not in last},
          {k: v for k, v in one.items() if k not in last})  # fmt: skip
    assert first["from_last"].tolist() == [1.0, 1.0]
    assert one["from_last"].tolist() == [0.0, 0.0]


def test_gradients_are_those_of_the_total_batch(folder):
    first, second, one = both(folder, ranks.gradients)
    same(first, second)
    close(first, one)


@pytest.mark.parametrize("job", [ranks.genie, ranks.hast, ranks.intraq])
def test_images_are_those_of_one_process(folder, job):
    first, second, one = both(folder, job)
    same(first, second)
    same(first, one)
    assert len(first["images"]) == 22


@pytest.mark.parametrize("job", [ranks.reconstruction, ranks.inundation, ranks.promotion])
def test_tuning_without_chance_takes_the_steps_of_one_process(folder, job):
    first, second, one = both(folder, job)
    same(first, second)
    # a code at its threshold may fall to either side
    moved = [k for k in one if not torch.allclose(first[k], one[k], rtol=1e-3, atol=1e-4)]
    wrong = sum(int((first[k] != one[k]).sum()) for k in moved if k.endswith("integers"))
    assert wrong <= 2
    assert all(k.endswith("integers") for k in moved)


def test_a_generators_step_is_that_of_one_process(folder):
    first, second, one = both(folder, ranks.learning)
    same(first, second)
    close(first, one, 1e-4)


@pytest.mark.parametrize("job", [ranks.dropping, ranks.together, ranks.starting])
def test_chance_differs_between_processes_and_results_do_not(folder, job):
    first, second, one = both(folder, job)
    same(first, second)
    assert first.keys() == one.keys()
    assert any(not torch.equal(first[k], one[k]) for k in one)


def test_an_interrupted_fine_tuning_ends_with_the_same_weights(folder):
    first, second, _ = both(folder, ranks.resumed)
    same(first, second)
    whole = {k.removeprefix("whole."): v for k, v in first.items() if k.startswith("whole.")}
    assert len(whole) * 2 == len(first)
    same(whole, {k: first[f"stopped.{k}"] for k in whole})


def test_batches_smaller_than_the_group_are_refused():
    with pytest.raises(UsageError, match=r"tuning.batch gives 3 image.*at most 3 processes"):
        Group(0, 4).check_batch(3, "tuning.batch")
    Group(0, 4).check_batch(4, "tuning.batch")


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_parts_are_even_and_make_up_the_whole(count):
    whole = torch.arange(count)
    groups = [Group(rank, 3) for rank in range(3)]
    parts = [group.part(whole) for group in groups]
    assert torch.equal(torch.cat(parts), whole)
    assert [len(part) for part in parts] == [group.part_of(count) for group in groups]
