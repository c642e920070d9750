# SPDX-License-Identifier: Apache-2.0
"""Loops that are replayed as CUDA graphs, whose results lie in memory that the next replay writes over.

No graph is captured here. What stands for one wipes, at every call, all that it returned before.
"""

import math

import pytest
import torch
from helpers.networks import Residual, with_own_statistics
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from zsq.cli import app
from zsq.config import Finetuning, load_recipe
from zsq.errors import UsageError
from zsq.runtime.context import Context
from zsq.runtime.policy import Compiled, Policy, make_policy
from zsq.stages import produce
from zsq.student import attach
from zsq.teacher.teacher import load_teacher
from zsq.tuning import compiling
from zsq.tuning.objective import Objective


class Replayed:
    """A function whose earlier results are gone when it is called again, as a captured graph's are."""

    calls = 0

    def __init__(self, function):
        self.function, self.returned = function, []

    def __call__(self, *arguments):
        Replayed.calls += 1
        for tensor in self.returned:
            tensor.detach().fill_(math.nan)
        result = self.function(*arguments)
        given = {a.data_ptr() for a in tree_leaves(arguments) if isinstance(a, Tensor)}
        self.returned = [
            leaf for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.data_ptr() not in given
        ]  # fmt: skip
        return result


@pytest.fixture
def replays(monkeypatch):
    modes = []

    def replace(function, *, dynamic=None, mode=None):
        modes.append(mode)
        return Replayed(function) if mode == "reduce-overhead" else function

    monkeypatch.setattr(torch, "compile", replace)
    monkeypatch.setattr(Replayed, "calls", 0)
    return modes


def test_what_stands_for_a_graph_does_wipe_results(replays):
    double = torch.compile(lambda x: 2 * x, mode="reduce-overhead")
    first = double(torch.ones(2))
    double(torch.ones(2))
    assert bool(first.isnan().all())


def test_results_outlive_the_next_replay(replays):
    both = Compiled(lambda x: (x.sum(), [x * x]), enabled=True, note=print, graphs=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    total, (square,) = both(x)
    (total + square.sum()).backward()
    both(torch.tensor([5.0, 6.0]))
    assert total.item() == 3
    assert square.tolist() == [1, 4]
    assert x.grad.tolist() == [3, 5]


def test_without_graphs_nothing_is_copied():
    same = Compiled(lambda x: x, enabled=False, note=print, graphs=True)
    x = torch.ones(2)
    assert same(x) is x


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    module = with_own_statistics(nn.Sequential(Residual()))
    return load_teacher(module, input_shape=(3, 8, 8))


@pytest.mark.parametrize("recipe", ["genie", "hast", "intraq", "gdfq", "qimera+ait", "autorecon"])
def test_every_loop_reads_results_before_they_are_gone_or_keeps_a_copy(
    teacher, replays, monkeypatch, recipe
):  # fmt: skip
    monkeypatch.setattr(compiling, "REPAID", 0)
    monkeypatch.setattr("zsq.runtime.policy.MIN_STEPS_TO_COMPILE", 1)
    changes = [
        "synthesis.images=16", "synthesis.batch=8", "synthesis.steps=4", "tuning.steps=4",
        "tuning.batch=8",
    ]  # fmt: skip
    wanted = load_recipe(recipe, schedule="quick", bits="w4a4", settings=changes)
    if isinstance(wanted.tuning, Finetuning):
        wanted = load_recipe(wanted, settings=["tuning.start=null"])

    def student(policy):
        return produce(teacher, wanted, None, Context(policy=policy))[0].state_dict()

    expected = student(Policy(compile=True))
    found = student(Policy(compile=True, cuda_graphs=True))
    assert "reduce-overhead" in replays
    assert Replayed.calls >= 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_graphs_need_a_gpu_and_a_compiler(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="needs --device cuda"):
        make_policy("cpu", cuda_graphs=True)
    asked = ["quantize", "zsq:resnet20_cifar10", "-o", str(tmp_path / "run"), "--cuda-graphs"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code != 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "graphs"), [("hast", False), ("intraq", True)])
def test_a_gradient_that_two_passes_add_up_is_not_a_graphs(replays, name, graphs):
    """A second graph writes over what the first one's backward pass left behind."""
    torch.manual_seed(0)
    teacher = load_teacher(with_own_statistics(Residual()), input_shape=(3, 8, 8))
    recipe = load_recipe(name, bits="w4a4")
    policy = Policy(torch.device("cpu"), compile=True, cuda_graphs=True)
    objective = Objective(teacher, attach(teacher, recipe), recipe.tuning, Context(policy=policy))
    assert objective._compiled.graphs == graphs
