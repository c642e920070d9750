# SPDX-License-Identifier: Apache-2.0
"""What is printed says what a reader must not miss, and can be read in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from zsq.bench.tables import bench_tables
from zsq.config import load_recipe
from zsq.sweep.tables import sweep_tables
from zsq.tables import export_table, inspection_tables, recipes_table, run_table
from zsq.teacher.inspect import inspect_teacher
from zsq.teacher.teacher import load_teacher


def printed(parts):
    """Return the lines that a terminal of 80 columns shows."""
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part)
    return console.file.getvalue().splitlines()


def test_names_from_files_are_text_and_nothing_else():
    recipe = {
        "name": "[/]",
        "protocol": "[red]",
        "bits": {"weights": 4, "activations": 4},
        "overrides": [1],
    }
    record = {
        "run": "r", "status": "[/]", "timings": {"[/]\x1b[2J": 1.0}, "results": {},
        "identity": {"model": "[/]", "recipe": recipe},
    }  # fmt: skip
    shown = "\n".join(printed(run_table(record)))
    assert "[/], [red], w4a4 mixed" in shown
    assert "time, [/]?[2J" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(("latency", "warned"), [(0.5, False), (20.0, True)])
def test_a_file_that_is_slower_than_float_says_so(latency, warned):
    report = {
        "target": "ort-cpu", "agreement": 100.0, "max_step_difference": 0.0, "identical": 100.0,
        "student_agreement": 93.0, "student_divergence": 0.04, "images": 128, "fused": 20, "convs": 21,
        "fused_matmuls": 1, "matmuls": 1, "unfused": ("a.b is [float]",), "bytes": 10, "float_bytes": 40,
        "ratio": 4.0, "threads": 1, "latency_ms": latency, "float_latency_ms": 10.0,
        "speedup": 10.0 / latency,
    }  # fmt: skip
    shown = "\n".join(printed(export_table(report)))
    for text in ("100.00 % of 128 images", "20 of 21", "a.b is [float]", "4.00x smaller than 40"):
        assert text in shown
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


def test_figures_of_a_sweep_are_whole_beside_long_names():
    row = {
        "model": "pytorchcv:mobilenetv2_w1", "recipe": "folder/of/recipes/mine_with_a_long_name.yaml",
        "bits": "plans/bits_of_another_name.yaml", "seed": 12, "student": 71.23, "drop": 2.04, "ratio": 7.77,
        "status": "not evaluated", "error": "why", "folder": "f", "protocol": "all-low-bit",
    }  # fmt: skip
    text = "\n".join(printed(sweep_tables([row])))
    for told in ("71.23", "2.04", "7.77", "12", "why", "1 of 1 cells failed"):
        assert told in text
    assert "…" not in text
    usual = row | {"model": "zsq:resnet20_cifar10", "recipe": "gdfq+ait", "bits": "w4a4"}
    assert "all-low-bit" in "\n".join(printed(sweep_tables([usual])))


def test_growth_is_whole_where_a_point_failed():
    good = {
        "along": "network", "loop": "reconstruction", "size": "pytorchcv:resnet50", "seconds": 1.0,
        "images_per_second": 123.4, "schedule_seconds": 1e6, "peak_memory_bytes": 10**9,
    }  # fmt: skip
    bad = {"along": "network", "loop": "genie", "size": "pytorchcv:vgg", "error": "too large " * 12}
    found = {
        "model": "m", "device": "cpu", "growth": [good, bad],
        "loops": [LOOP],
    }  # fmt: skip
    text = " ".join("\n".join(printed(bench_tables(found))).split())
    for told in ("16666.7 min", "1.00 GB", "123.4", "pytorchcv:vgg: too large"):
        assert told in text
    assert "…" not in text


LOOP = {
    "loop": "genie", "precision": "float32", "compiled": False, "batch": 4, "seconds": 0.1,
    "steps_per_second": 10.0, "images_per_second": 40.0, "flops": 1e9, "share_of_peak": 0.1,
    "bare": {"seconds": 0.1, "share_of_peak": 0.1}, "ratio_to_bare": 1.0, "peak_memory_bytes": 10**9,
    "threads": 1, "matmul_peak": 1e12, "memory_kind": "resident",
}  # fmt: skip


def test_a_recipe_is_told_whole():
    recipe = load_recipe("hast")
    words = " ".join(" ".join(printed(recipes_table([recipe]))).split())
    for told in (recipe.name, *recipe.title.split(), recipe.paper, "11200 student steps"):
        assert told in words
