# SPDX-License-Identifier: Apache-2.0
"""What the caller told PyTorch to do everywhere does not reach what zsq computes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import torch
from helpers.networks import Residual, with_own_statistics

import zsq
from zsq.runtime.ambient import own_modes
from zsq.runtime.policy import make_policy

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


@pytest.mark.parametrize("enabled", [True, False])
def test_weights_that_move_are_not_those_of_the_callers_autocast(enabled):
    """Which keeps copies in bf16 until its own end, however many others begin and end within."""
    policy = make_policy("cpu", "bf16", compile=False)
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)

    def twice():
        with policy.autocast():
            before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        with policy.autocast():
            return before, layer(x)

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        before, after = twice()
    assert not torch.equal(before, after)


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


#: What a script may have said about float32 on a GPU, in the older and the newer words.
PRECISIONS = {
    "nothing": "pass",
    "cuDNN with TF32": "b.cudnn.allow_tf32 = True",
    "products with TF32": "b.cuda.matmul.allow_tf32 = True",
    "high": "torch.set_float32_matmul_precision('high')",
    "convolutions, newer": "b.cudnn.conv.fp32_precision = 'ieee'",
    "cuDNN, newer": "b.cudnn.fp32_precision = 'tf32'",
    "everything, newer": "b.fp32_precision = 'tf32'",
    "deterministic": "b.cudnn.deterministic = True",
}
IN_SCRIPTS = """
import os
import sys
import torch
from torch import nn
from zsq.runtime.ambient import own_modes

b = torch.backends
def state():
    try:
        allowed = b.cudnn.allow_tf32
    except RuntimeError:
        allowed = "told by kind"
    places = (b, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul)
    return allowed, b.cudnn.deterministic, [place.fp32_precision for place in places]

def check(said):
    exec(said)
    before = state()
    with own_modes():
        assert not b.cudnn.allow_tf32 and b.cudnn.deterministic
        assert b.cudnn.conv.fp32_precision in ("none", "ieee")
        torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(2, 3, 8, 8),), strict=False)
    assert state() == before, (said, before, state())

for said in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(said)
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        print(said)
"""


def test_convolutions_on_a_gpu_are_exact_and_what_the_script_said_holds_again():
    """These settings are there without a GPU too; they are the process's, so every script has one."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_SCRIPTS, *PRECISIONS.values()],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "", done.stderr
