# SPDX-License-Identifier: Apache-2.0
"""What the caller told PyTorch to do everywhere does not reach what zsq computes."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import torch
from helpers.networks import Residual, with_own_statistics

import zsq
from zsq.runtime.ambient import own_modes

FEW = ["synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2", "tuning.steps=2", "tuning.batch=4"]  # fmt: skip


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "no gradients": torch.no_grad, "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "meta": lambda: torch.device("meta"),
    "double": lambda: default_dtype(torch.float64), "bfloat16": lambda: default_dtype(torch.bfloat16),
}  # fmt: skip


@own_modes()
def failing():
    raise ZeroDivisionError


def state():
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), torch.get_default_device().type,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_do_not_hold_inside_and_hold_again_afterwards(mode):
    plain = state()
    with mode():
        before = state()
        assert before != plain
        with own_modes():
            assert state() == plain
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            failing()
        assert state() == before
    assert state() == plain


def quantized(model, recipe="genie"):
    return zsq.quantize(
        model, recipe, bits="w4a4", input_shape=(3, 8, 8), settings=FEW, compile=False,
        precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    torch.manual_seed(0)
    model = with_own_statistics(Residual())
    return model, quantized(model).state_dict()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_student_is_the_same_under_any_mode(mode, expected):
    model, wanted = expected
    with mode():
        student = quantized(model)
    found = student.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_network_made_in_inference_mode_is_taken(expected):
    model, wanted = expected
    with torch.inference_mode():
        own = Residual()
        own.load_state_dict(model.state_dict())
        found = quantized(own.eval()).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_threads_take_turns_and_get_what_they_would_get_alone(expected):
    model, wanted = expected
    with ThreadPoolExecutor(2) as threads:
        students = list(threads.map(quantized, [model, model]))
    for student in students:
        found = student.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_needs_no_turn_does_not_wait(expected, tmp_path):
    inside, read = Event(), Event()

    def long():
        with own_modes():
            inside.set()
            return read.wait(60)

    zsq.save(quantized(expected[0]), tmp_path / "student.safetensors")
    with ThreadPoolExecutor(1) as threads:
        holder = threads.submit(long)
        inside.wait(60)
        zsq.load(tmp_path / "student.safetensors")
        read.set()
        assert holder.result()
