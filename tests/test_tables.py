# SPDX-License-Identifier: Apache-2.0
"""What is printed says what a reader must not miss, and can be read in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from zsq.config import load_recipe
from zsq.tables import export_table, inspection_tables, recipes_table
from zsq.teacher.inspect import inspect_teacher
from zsq.teacher.teacher import load_teacher


def printed(parts):
    """Return the lines that a terminal of 80 columns shows."""
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("latency", "warned"), [(0.5, False), (20.0, True)])
def test_a_file_that_is_slower_than_float_says_so(latency, warned):
    report = {"latency_ms": latency, "float_latency_ms": 10.0, "speedup": 10.0 / latency}
    words = [part for part in export_table(report) if isinstance(part, str)]
    assert any("slower here than the float one" in word for word in words) == warned


def test_a_layer_of_resnet20_is_one_line():
    found = inspect_teacher(load_teacher("zsq:resnet20_cifar10"))
    lines = [line.split() for line in printed(inspection_tables(found))]
    assert [
        "features.stage1.unit1.body.conv1.conv",
        "16x16x3x3",
        "1",
        "2,359,296",
        "4/4/4",
    ] in lines
    assert ["output", "10x64", "1", "640", "8/8/4"] in lines


def test_a_recipe_is_told_whole():
    recipe = load_recipe("hast")
    words = " ".join(" ".join(printed(recipes_table([recipe]))).split())
    for told in (recipe.name, *recipe.title.split(), recipe.paper, "11200 student steps"):
        assert told in words
