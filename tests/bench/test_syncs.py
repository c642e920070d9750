# SPDX-License-Identifier: Apache-2.0
"""On a GPU no loop waits for the device between two looks at its loss."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers.watching import WATCHED, watch

from zsq.bench.loops import Job
from zsq.bench.measure import LOOPS
from zsq.config import Finetuning
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.synthesis.batches import FixedImages
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import load_teacher


@contextmanager
def _warned_of_waits():
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs(drive, skip):
    """Return what waits for the device from one step of a loop to another."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch(drive, skip, _warned_of_waits())
    return [
        str(w.message) for w in caught if "called a synchronizing CUDA operation" in str(w.message)
    ]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LOOPS)
def test_loops_do_not_wait_for_the_device_in_steady_state(name, compile):
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    policy = make_policy("cuda", "auto", compile)
    job = Job(load_teacher("zsq:resnet20_cifar10"), policy, batch=16)
    part = next(LOOPS[name](job))
    assert syncs(part.drive, part.skip) == []


@pytest.mark.gpu
@pytest.mark.parametrize("crop", [None, {"probability": 1.0, "smallest": 0.5}])
def test_batches_of_a_set_are_not_waited_for(crop):
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    teacher = load_teacher("zsq:resnet20_cifar10")
    images = ImageSet(torch.randn(64, 3, 32, 32), torch.arange(64) % 10)
    context = Context(policy=make_policy("cuda", "auto", False))
    source = FixedImages(teacher, images, Finetuning(batch=16, crop=crop), context)

    def drive(tick):
        while True:
            source.next(1.0)
            tick(1)

    assert syncs(drive, 0) == []


@pytest.mark.gpu
def test_a_loop_that_waits_is_found_out():
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    value = torch.ones((), device="cuda")

    def drive(tick):
        while True:
            float(value)
            tick(1)

    assert len(syncs(drive, 0)) == WATCHED
