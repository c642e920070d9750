# SPDX-License-Identifier: Apache-2.0
"""The architecture search on a network small enough to search with."""

import pytest
import torch
from helpers.networks import Residual, with_own_statistics
from torch import nn

from zsq.config import GeneratorSynthesis
from zsq.errors import RunError
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.synthesis import generators, search
from zsq.synthesis.architecture import CROSSES, OPERATIONS, Cell, published_architectures
from zsq.synthesis.search import (
    SearchSettings,
    _Choice,
    _OpenCell,
    sample_choices,
    search_architecture,
)
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.teacher import ModelInfo, Teacher

FEW = SearchSettings(steps=4, batch=4, warmup=0.25)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = build_network(export_module(with_own_statistics(Residual()), (3, 8, 8)))
    return Teacher(network.requires_grad_(False), ModelInfo("residual", (3, 8, 8)))


def test_a_search_ends_with_a_valid_architecture_and_is_repeatable(teacher, tmp_path):
    found = search_architecture(teacher, FEW, Context(seed=1))
    assert [len(cell.crosses) for cell in found.cells] == [0, 6, 6]
    found.save(tmp_path / "cells.yaml")
    torch.randn(3)
    assert search_architecture(teacher, FEW, Context(seed=1)) == found
    assert type(found).load(tmp_path / "cells.yaml") == found


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_search_ends_like_an_uninterrupted_one(
    teacher, tmp_path, monkeypatch, after
):
    """Before the logits learn, and after."""
    monkeypatch.setattr(search, "CHECKPOINT_EVERY", 1)
    ends, keep = {}, search._Search.save

    def save(self, done):
        keep(self, done)
        ends[stage] = [p.detach().clone() for p in self.network.parameters()]
        if stage == "cut" and done == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(search._Search, "save", save)
    stage = "whole"
    found = search_architecture(teacher, FEW, Context(seed=1))
    context = Context(seed=1, checkpoints=Checkpoints(tmp_path))
    stage = "cut"
    with pytest.raises(KeyboardInterrupt):
        search_architecture(teacher, FEW, context)
    torch.randn(7)
    stage = "rest"
    assert search_architecture(teacher, FEW, context) == found
    assert all(torch.equal(a, b) for a, b in zip(ends["whole"], ends["rest"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends["cut"], ends["rest"], strict=True))


ONE = (torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


class Scaled(nn.Module):
    """A choice that multiplies by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, classes, weights):
        return self.factor * x


def choice_of(factors, logits):
    """An edge whose choices multiply; a factor of None is the choice "none"."""
    names = ["0" if factor is None else str(i + 1) for i, factor in enumerate(factors)]
    choice = _Choice("", up=False, classes=2, channels=3)
    choice.choices, choice.logits = tuple(names), nn.Parameter(torch.tensor(logits))
    choice.edges = nn.ModuleDict({
        name: Scaled(factor) for name, factor in zip(names, factors, strict=True) if name != "0"
    })  # fmt: skip
    choice.comparing = True
    return choice


def mean_gradient(choice, loss, samples=300):
    """The mean and the standard error of the logits' gradient over samples."""
    torch.manual_seed(0)
    x, found = torch.ones(1), []
    for _ in range(samples):
        sample_choices([choice])
        (slope,) = torch.autograd.grad(loss(choice(x, *ONE)[0]), choice.logits)
        found.append(slope)
    slopes = torch.stack(found)
    return slopes.mean(0), slopes.std(0) / samples**0.5


@pytest.mark.parametrize("logits", [(1.5, 0.0), (0.0, 0.0), (-3.0, 1.0)])
def test_equal_choices_do_not_move_their_logits(logits):
    mean, error = mean_gradient(choice_of((2.0, 2.0), logits), lambda y: (y - 1).square().sum())
    assert bool((mean.abs() <= 3 * error + 1e-6).all())


@pytest.mark.parametrize("factors", [(0.2, 1.0), (-1.0, 1.0), (None, 1.0), (3.0, None, 1.0)])
def test_the_better_choice_gains(factors):
    """Descent raises the logit of the choice that the loss wants, wherever the sample falls."""
    start = [0.5] * (len(factors) - 1) + [0.0]
    mean, error = mean_gradient(choice_of(factors, start), lambda y: (y - 1).square().sum())
    assert float(mean[-1]) < -5 * float(error[-1])
    assert float(mean.sum()) == pytest.approx(0.0, abs=1e-5)  # what one gains others lose


def test_a_linear_loss_has_the_gradient_of_the_relaxed_sample():
    """The same mean from samples that the test draws and softens itself."""
    factors, logits = (1.0, 4.0, -2.0), (0.3, -0.2, 0.1)
    mean, error = mean_gradient(choice_of(factors, logits), torch.sum, samples=600)
    noise = torch.distributions.Gumbel(0.0, 1.0).sample((200000, 3))
    relaxed = (torch.tensor(logits) + noise).softmax(1)
    values = torch.tensor(factors)
    wanted = relaxed * (values - (relaxed * values).sum(1, keepdim=True))
    assert bool(((mean - wanted.mean(0)).abs() < 4 * error).all())


def both_ways(module, x, *rest):
    """Results of the same sample, with the sampled choices alone and with all of them."""
    found, seed = [], int(torch.randint(1000, ()))
    choices = [module for module in module.modules() if isinstance(module, _Choice)]
    for comparing in (False, True):
        for choice in choices:
            choice.comparing = comparing
        torch.manual_seed(seed)
        sample_choices(choices)
        found.append(module(x, *rest))
    return found


@pytest.mark.parametrize("crosses", [0, 6])
@pytest.mark.parametrize("seed", range(3))
def test_computing_all_choices_changes_no_node(seed, crosses):
    torch.manual_seed(seed)
    cell, x = _OpenCell(2, 3, crosses), torch.randn(2, 3, 4, 4)
    before = [torch.randn(2, 3, 4, 4), None, torch.randn(2, 3, 4, 4), None] if crosses else ()
    with torch.no_grad():
        for edge in (*cell.operations, *cell.crosses):
            edge.logits[0] = 2.0  # "none" often, so that some nodes are reached by nothing else
    for _ in range(4):
        alone, compared = both_ways(cell, x, before, *ONE)
        assert [n is None for n in alone] == [n is None for n in compared]
        for a, b in zip(alone, compared, strict=True):
            assert a is None or torch.allclose(a, b, atol=1e-5)


def test_the_sampled_choice_is_the_result():
    torch.manual_seed(0)
    choice = _Choice(OPERATIONS, up=False, classes=2, channels=3)
    with torch.no_grad():
        choice.logits[OPERATIONS.index("s")] = 50.0
    x = torch.randn(2, 3, 4, 4)
    for result, real in both_ways(choice, x, *ONE):
        assert torch.allclose(result, x)
        assert real


def test_none_is_a_choice():
    choice = _Choice(CROSSES, up=True, classes=2, channels=3)
    with torch.no_grad():
        choice.logits[0] = 50.0
    (result, real), (zeros, also) = both_ways(choice, torch.randn(2, 3, 4, 4), *ONE)
    assert result is None
    assert not real
    assert not also
    assert torch.equal(zeros, torch.zeros(2, 3, 8, 8))
    assert choice.best() == "0"
    assert choice.best(but="0") in CROSSES[1:]


def test_a_cell_that_nothing_leaves_is_repaired():
    cell = _OpenCell(2, 3, 6)
    with torch.no_grad():
        for edge in (*cell.operations, *cell.crosses):
            edge.logits[0] = 9.0
    found = cell.best()
    assert isinstance(found, Cell)
    assert found.feeds(3)


def test_logits_learn_after_the_warm_up_only(teacher, monkeypatch):
    rates, reached = [], []
    step = torch.optim.Adam.step

    def spy(self, *rest):
        group = self.param_groups[0]
        rates.append(group["lr"])
        if group["lr"] == 3e-3:
            reached.extend(p.grad is not None and bool(p.grad.all()) for p in group["params"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    search_architecture(teacher, SearchSettings(steps=4, batch=4, warmup=0.5), Context())
    assert rates == [1e-3, 1e-3, 1e-3, 3e-3, 1e-3, 3e-3]
    assert sum(reached) > 0.8 * len(reached), "the logits of all choices, on nearly every edge"


def test_the_temperature_falls_by_equal_factors(teacher, monkeypatch):
    seen = []
    sample = search.gumbel_softmax

    def spy(logits, temperature, **options):
        seen.append(temperature)
        return sample(logits, temperature, **options)

    monkeypatch.setattr(search, "gumbel_softmax", spy)
    search_architecture(teacher, SearchSettings(steps=3, batch=4, warmup=1, hot=8.0, cold=2.0),
                        Context())  # fmt: skip
    assert list(dict.fromkeys(seen)) == pytest.approx([8.0, 4.0, 2.0])


def test_a_search_has_the_loss_and_the_rate_of_the_generator(teacher, monkeypatch):
    asked = []

    def spy(teacher, settings, context):
        asked.append(settings)
        return published_architectures()["resnet18"]

    monkeypatch.setattr(generators, "search_architecture", spy)
    settings = GeneratorSynthesis(
        generator="autorecon", architecture="search", statistics_weight=7.0, lr=0.02, batch=6,
        search_steps=9,
    )  # fmt: skip
    generators.build_generator(teacher, settings, 5, Context())
    (found,) = asked
    assert (found.statistics_weight, found.weight_lr) == (7.0, 0.02)
    assert (found.batch, found.steps) == (6, 9)


def test_nan_stops_with_a_hint(teacher):
    with pytest.raises(RunError, match="architecture=published"):
        search_architecture(teacher, SearchSettings(steps=6, batch=4, weight_lr=1e30), Context())
