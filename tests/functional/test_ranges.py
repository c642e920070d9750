# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from zsq.functional.affine import search_activation_grid
from zsq.functional.ranges import range_grid


def ends(grid, bits):
    low = -float(grid.zero_point * grid.scale)
    return low, low + float(grid.scale) * (2**bits - 1)


def test_minmax_spans_the_data_and_contains_zero():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    low, high = ends(range_grid(x, 8, "minmax"), 8)
    assert low == pytest.approx(float(x.min()), abs=0.02)
    assert high == pytest.approx(float(x.max()), abs=0.02)
    low, high = ends(range_grid(x.abs() + 3, 8, "minmax"), 8)
    assert low == 0


def test_percentiles_are_numpys():
    x = torch.randn(20001, generator=torch.Generator().manual_seed(0))
    low, high = ends(range_grid(x, 8, "percentile", percentile=99.0), 8)
    assert low == pytest.approx(np.percentile(x, 1.0), abs=0.02)
    assert high == pytest.approx(np.percentile(x, 99.0), abs=0.02)
    assert ends(range_grid(x, 8, "percentile", percentile=100), 8) == pytest.approx(
        ends(range_grid(x, 8, "minmax"), 8)
    )


def test_error_is_the_search_and_beats_the_others_at_its_own_measure():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).relu() ** 2
    grids = {rule: range_grid(x, 4, rule, power=2.0) for rule in ("minmax", "percentile", "error")}
    assert float(grids["error"].scale) == float(search_activation_grid(x, 4, power=2.0).scale)

    def error(grid):
        codes = torch.clamp(torch.round(x / grid.scale) + grid.zero_point, 0, 15)
        return float(((codes - grid.zero_point) * grid.scale - x).square().mean())

    assert error(grids["error"]) <= min(error(grids["minmax"]), error(grids["percentile"]))
