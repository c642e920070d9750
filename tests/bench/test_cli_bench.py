# SPDX-License-Identifier: Apache-2.0
"""`zsq bench` as a person types it."""

import json
import os
import subprocess

import pytest
from helpers.runs import write_model, zsq, zsq_json

from zsq.bench import Request, bench, processes
from zsq.bench.peak import SIDES
from zsq.bench.plots import plot_growth
from zsq.errors import RunError, UsageError

QUICK = ["--batch", "4", "--steps", "1", "--no-compile", "--precision", "fp32"]
KEYS = {
    "model", "loop", "input_shape", "parameters", "batch", "images", "precision", "compiled", "cuda_graphs", "steps",
    "threads", "seconds", "steps_per_second", "images_per_second", "flops", "flops_per_second",
    "share_of_peak", "schedule_seconds", "peak_memory_bytes", "memory_kind", "matmul_peak", "bare",
    "ratio_to_bare",
}  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure here, which is faster, with a smaller matrix product."""
    from zsq.bench.measure import measure

    monkeypatch.setitem(SIDES, "cpu", 128)
    monkeypatch.setattr("zsq.bench.run.measure_apart", measure)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def test_one_loop_is_measured_in_a_process_of_its_own(monkeypatch, capsys, model, tmp_path):
    out = tmp_path / "new" / "bench.json"
    options = ["--loop", "pixels", *QUICK, "-o", out]
    found = zsq_json(monkeypatch, capsys, "bench", model, *options)
    assert json.loads(out.read_text()) == found
    assert set(found) == {"model", "device", "environment", "loops"}
    (row,) = found["loops"]
    assert set(row) == KEYS
    if os.path.exists("/proc/self/clear_refs"):
        assert row["peak_memory_bytes"] > 0


def test_loops_and_growth_are_shown_as_tables(
    monkeypatch, capsys, model, tmp_path, in_this_process
):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "b.json"
    code, text, _ = zsq(
        monkeypatch, capsys, "bench", model, *QUICK, "--plain", "--quiet", "-o", out,
        "--loop", "pixels", "--loop", "reconstruction", "--grow", "batch=4,6",
    )  # fmt: skip
    assert code == 0
    for word in (
        "pixels",
        "reconstruction, block by block",
        "times bare",
        "faster",
        "growth along batch",
    ):
        assert word in text
    found = json.loads(out.read_text())
    assert [row["loop"] for row in found["loops"]] == ["pixels", "reconstruction"]
    points = [(p["loop"], p["along"], p["size"], p["batch"]) for p in found["growth"]]
    assert points[:2] == [("pixels", "batch", "4", 4), ("pixels", "batch", "6", 6)]
    assert len(points) == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_networks_can_grow_and_a_point_that_fails_says_so(monkeypatch, model, in_this_process):
    from zsq.bench.measure import measure

    def short_of_memory(request, note):
        if request.batch == 6:
            raise RunError("out of memory")
        return measure(request, note)

    monkeypatch.setattr("zsq.bench.run.measure_apart", short_of_memory)
    request = Request(model, batch=4, steps=1, precision="fp32", compile=False)
    grow = [("batch", ["6"]), ("network", [model])]
    failed, worked = bench(request, ["pixels"], grow=grow)["growth"]
    assert failed == {"along": "batch", "size": "6", "loop": "pixels", "error": "out of memory"}
    assert worked["parameters"] > 0
    figure = plot_growth([failed, worked])
    assert {axes.get_xlabel() for axes in figure.axes} == {"batch", "parameters"}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--loop", "genei"], "genie, pixels"), (["--batch", "1"], "at least 2"),
     (["--grow", "depth"], "images, batch, network"), (["--grow", "batch=many"], "no number"),
     (["--device", "abacus"], "use cpu, cuda"), (["--input-shape", "3"], "channels, height, width")],
)  # fmt: skip
def test_bad_requests_end_with_code_2(
    monkeypatch, capsys, options, message, model, in_this_process
):
    code, _, err = zsq(monkeypatch, capsys, "bench", model, *options, "--quiet")
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [("nosuch", [], "'nosuch' names no network"), ("net.pt2", ["--device", "cuda:99"], "does not exist"),
     ("net.pt2", ["--grow", "network=net.pt2,zsq:nosuch"], "no network 'nosuch'")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is(
    monkeypatch, capsys, tmp_path, model, options, message
):
    write_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zsq.bench.run.measure_apart", lambda *request: pytest.fail("measured"))
    code, _, err = zsq(monkeypatch, capsys, "bench", model, *options, "--quiet")
    assert code == 2
    assert message in err


def test_errors_of_the_other_process_are_raised_here(monkeypatch):
    def run(command, input, **options):
        return subprocess.CompletedProcess(command, 0, json.dumps(processes._answer(input)), "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UsageError, match="nonsense"):
        processes.measure_apart(Request("zsq:nonsense"), print)


def test_a_process_that_is_killed_points_at_memory(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: killed)
    with pytest.raises(RunError, match="smaller --batch"):
        processes.measure_apart(Request("m"), print)


def test_notes_of_the_other_process_are_passed_on(monkeypatch):
    def measure(request, note):
        note(f"compiling {request.input_shape} failed")
        return {"loop": request.loop}

    monkeypatch.setattr(processes, "measure", measure)
    answer = processes._answer(json.dumps(vars(Request("m", input_shape=(3, 8, 8)))))
    assert answer == {"result": {"loop": "genie"}, "notes": ["compiling (3, 8, 8) failed"]}
