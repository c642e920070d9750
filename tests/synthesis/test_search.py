# SPDX-License-Identifier: Apache-2.0
"""The architecture search on a network small enough to search with."""

import pytest
import torch
from helpers.networks import Residual, with_own_statistics

from zsq.errors import RunError
from zsq.runtime.context import Context
from zsq.synthesis.architecture import CROSSES, OPERATIONS, Cell
from zsq.synthesis.search import SearchSettings, _Choice, _OpenCell, search_architecture
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


def test_the_gumbel_sample_is_straight_through():
    """The forward pass is the sampled choice itself; its logit gets the gradient."""
    torch.manual_seed(0)
    choice = _Choice(OPERATIONS, up=False, classes=2, channels=3)
    with torch.no_grad():
        choice.logits[OPERATIONS.index("s")] = 50.0
    x = torch.randn(2, 3, 4, 4)
    classes, weights = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    result = choice(x, classes, weights)
    assert torch.allclose(result, x)
    choice.temperature = 30.0
    torch.manual_seed(3)
    while (result := choice(x, classes, weights)) is None:
        pass
    result.sum().backward()
    assert choice.logits.grad.abs().sum() > 0


def test_none_is_a_choice():
    choice = _Choice(CROSSES, up=True, classes=2, channels=3)
    with torch.no_grad():
        choice.logits[0] = 50.0
    assert (
        choice(torch.randn(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
        is None
    )
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
    rates = []
    step = torch.optim.Adam.step

    def spy(self, *rest):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    search_architecture(teacher, SearchSettings(steps=4, batch=4, warmup=0.5), Context())
    assert rates == [1e-3, 1e-3, 1e-3, 3e-3, 1e-3, 3e-3]


def test_nan_stops_with_a_hint(teacher):
    with pytest.raises(RunError, match="architecture=published"):
        search_architecture(teacher, SearchSettings(steps=60, batch=4, weight_lr=1e30), Context())
