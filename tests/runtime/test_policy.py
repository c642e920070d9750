# SPDX-License-Identifier: Apache-2.0
"""Compilation that fails, and optimisers that go on where they were."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from zsq.errors import UsageError
from zsq.runtime.optimizers import optimizer_state, restore_optimizer
from zsq.runtime.policy import Compiled, make_policy


def refuse(graph, inputs):
    raise RuntimeError("no compiler for this pass")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("broken", ["fw_compiler", "bw_compiler"])
def test_a_failure_in_either_pass_is_noted_and_gone_on_from(monkeypatch, broken):
    compilers = {
        "fw_compiler": lambda graph, inputs: graph,
        "bw_compiler": lambda graph, inputs: graph,
    }
    backend = aot_autograd(**compilers | {broken: refuse})
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **named: compile(f, backend=backend, **named))
    notes = []
    square = Compiled(lambda x: (x * x.sin()).sum(), enabled=True, note=notes.append)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    square(x).backward()
    assert torch.allclose(x.grad, x.detach().sin() + x.detach() * x.detach().cos())
    assert len(notes) == 1
    assert notes[0].startswith("torch.compile failed")
    square(x).backward()
    assert len(notes) == 1


@pytest.mark.timeout(300)
def test_a_failure_of_the_version_with_gradients_is_gone_on_from_after_one_without(monkeypatch):
    """Sliced losses are looked at without gradients first, and compiled anew for these."""
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=refuse)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **named: compile(f, backend=backend, **named))
    notes = []
    square = Compiled(lambda x: (x * x.cos()).sum(), enabled=True, note=notes.append)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with torch.no_grad():
        assert float(square(x)) == pytest.approx(float((x * x.cos()).sum()))
    square(x).backward()
    assert torch.allclose(x.grad, x.detach().cos() - x.detach() * x.detach().sin())
    assert len(notes) == 1


def test_a_full_memory_is_no_failure_to_compile(monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "compile", lambda f, **named: full)
    notes = []
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(torch.sin, enabled=True, note=notes.append)(torch.ones(1))
    assert not notes


class Elsewhere:
    """What is restored of an optimiser whose parameters are on another device."""

    def __init__(self, **group):
        self.parameters = [torch.empty(3, 2, device="meta"), torch.empty((), device="meta")]
        self.param_groups = [{"params": self.parameters, **group}]
        self.state = {parameter: {} for parameter in self.parameters}


@pytest.mark.parametrize(("group", "place"), [
    ({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({"fused": None}, "cpu"), ({}, "cpu"),
])  # fmt: skip
def test_steps_are_counted_where_the_optimiser_counts_them(group, place):
    own = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(()))]
    rule = torch.optim.Adam(own)
    sum(p.square().sum() for p in own).backward()
    rule.step()
    other = Elsewhere(**group)
    restore_optimizer(other, "adam", optimizer_state(rule, "adam"))
    for parameter in other.parameters:
        state = other.state[parameter]
        assert state["step"].device.type == place
        assert state["exp_avg"].device.type == "meta"
        assert state["exp_avg"].shape == parameter.shape


def test_precisions_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="'fp16' is none of auto, fp32, bf16"):
        make_policy("cpu", "fp16")
