# SPDX-License-Identifier: Apache-2.0
"""Many runs from one file."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers.runs import NORMALISATION, SHAPE, write_images, write_model, zsq, zsq_json

from zsq import cli, sweep
from zsq.errors import RunError, UsageError, ZsqError
from zsq.runtime import machine
from zsq.sweep import Sweep, cell, run_sweep
from zsq.sweep.cluster import run_on_ray
from zsq.sweep.run import _locally

SETTINGS = """
schedule: quick
settings: [synthesis.images=8, synthesis.steps=2, synthesis.batch=8, tuning.steps=2, tuning.batch=4]
"""


def write_sweep(folder, recipes, seeds="[0]", data=None, more=()):
    model = write_model(folder)
    options = [f"{SHAPE[0]}={SHAPE[1]}", f"{NORMALISATION[0]}={NORMALISATION[1]}",
               f"{NORMALISATION[2]}={NORMALISATION[3]}", "--no-compile", "--no-report", *more]  # fmt: skip
    text = (
        f"models: [{model}]\nrecipes: {recipes}\nseeds: {seeds}\noptions: {json.dumps(options)}\n"
    )
    text += SETTINGS + (f"data: {data}\n" if data else "")
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


def in_this_process(arguments, threads, gpu=None):
    """Stand in for `zsq.sweep.cell._zsq`: the same command without the seconds that a process takes."""
    try:
        cli.app([*arguments, "--json"], standalone_mode=False)
    except ZsqError as error:
        return f"zsq: {error}"
    return ""


def test_a_sweep_fills_its_table_and_only_does_what_is_missing(tmp_path, monkeypatch, capsys):
    data = write_images(tmp_path / "images")
    file = write_sweep(tmp_path, "[genie]", "[0, 1]", data)
    first = zsq_json(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out", "--workers", 2)
    assert [row["status"] for row in first["cells"]] == ["done", "done"]
    assert [row["seed"] for row in first["cells"]] == [0, 1]
    assert all({"student", "drop", "ratio", "protocol"} <= set(row) for row in first["cells"])
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count("edges-8bit") == 2
    runs = [tmp_path / "out" / row["folder"] for row in first["cells"]]
    before = [(run / "student.safetensors").stat().st_mtime_ns for run in runs]
    monkeypatch.setattr(cell, "_zsq", in_this_process)
    code, _, _ = zsq(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out", "--quiet")
    assert code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first["cells"]
    assert before == [(run / "student.safetensors").stat().st_mtime_ns for run in runs]


def test_a_changed_sweep_never_shows_the_numbers_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cell, "_zsq", in_this_process)
    images, others = (
        write_images(tmp_path / name, n) for name, n in (("images", 6), ("others", 9))
    )
    out = tmp_path / "out"

    def row(code, *, steps=2, data=None):
        file = write_sweep(tmp_path, "[genie]", data=data)
        file.write_text(file.read_text().replace("tuning.steps=2", f"tuning.steps={steps}"))
        assert zsq(monkeypatch, capsys, "sweep", file, "-o", out, "--quiet")[0] == code
        return json.loads((out / "results.json").read_text())[0]

    run = out / row(0, data=images)["folder"]
    (run / "integer.safetensors").unlink()  # made again on the way
    shown = row(0, data=others)
    evaluation = json.loads((run / "run.json").read_text())["results"]["evaluation"]
    assert (evaluation["data"], evaluation["student"]["images"]) == (os.path.realpath(others), 9)
    assert shown["student"] == evaluation["student"]["top1"]
    assert "student" not in row(0)
    refused = row(1, steps=3, data=others)
    assert refused["status"] == "failed"
    assert "recipe.tuning.steps was 2, now 3" in refused["error"]
    assert not {"student", "ratio", "seconds"} & set(refused)


def test_a_cell_that_fails_says_why_and_stops_nothing(tmp_path, monkeypatch, capsys):
    file = write_sweep(tmp_path, "[nonsense, genie]")
    code, out, _ = zsq(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out", "--quiet")
    assert code == 1
    assert "1 of 2 cells failed" in out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert "nonsense" in rows[0]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("recipes: [genie]", "models"), ("models: []\nrecipes: [a]", "models"), ("a: [", "cannot be read"),
     ("models: [a]\nrecipes: [b]\ncolour: red", "colour"),
     ("models: [a.py:f, ./a.py:f]\nrecipes: [b]", "share the folder a_py_f.b.w4a4.0; leave out"),
     ("models: [--help]\nrecipes: [b]", "the model '--help' is none"),
     ("models: [a]\nrecipes: [b]\noptions: [--allow-pickle]", "given to `zsq sweep` itself"),
     ("models: [a]\nrecipes: [b]\noptions: [--out=x]", "is not a cell's"),
     ("models: [a]\nrecipes: [b]\noptions: [-ox]", "is not a cell's")],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Sweep.load(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


def test_pickles_are_allowed_on_the_command_line_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.yaml").write_text("models: [a]\nrecipes: [b]\noptions: [--threads=1]")
    given = []
    monkeypatch.setattr(sweep, "run_sweep", lambda cells, *_, **more: given.append(cells) or [])
    for extra in ((), ("--allow-pickle",)):
        zsq(monkeypatch, capsys, "sweep", tmp_path / "s.yaml", "-o", tmp_path / "out", *extra)
    assert [cells.options for cells in given] == [
        ("--threads=1",), ("--threads=1", "--allow-pickle"),
    ]  # fmt: skip


def test_a_record_that_is_not_there_has_no_scores():
    cells = Sweep(models=("a",), recipes=("b",), data="x")
    assert cell._scores(cells, {}) is None


def test_an_option_that_does_not_exist_is_the_error_of_its_cell():
    """The last line of what the command line says then is the border of a box."""
    assert "No such option: --nonsense" in cell._zsq(["quantize", "--nonsense"], 1)


def test_cells_are_told_whom_not_to_outlive(monkeypatch):
    told = {}

    def run(command, env, **options):
        told.update(env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert cell._zsq(["env"], 1) == ""
    assert told[machine.ENDS_WITH_PARENT] == str(os.getpid())


def test_the_command_line_ends_with_its_parent(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "end_with_parent", lambda: asked.append(True))
    zsq(monkeypatch, capsys, "env")
    assert asked


def test_a_run_is_no_folder_for_a_sweep(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a run"):
        run_sweep(Sweep(models=("a",), recipes=("b",)), tmp_path)


PARENT = """
import os, runpy, subprocess, sys, threading
machine = runpy.run_path(sys.argv[1])
child = '''
import runpy, sys, time
machine = runpy.run_path(sys.argv[1])
machine["end_with_parent"]()
print("up", flush=True)
time.sleep(60)
'''
run = lambda: subprocess.run(
    [sys.executable, "-c", child, sys.argv[1]], env=os.environ | {machine["ENDS_WITH_PARENT"]: str(os.getpid())}
)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such call")
def test_cells_end_with_their_sweep():
    """Killed, it would leave them at work on folders that the next one finds taken."""
    command = [sys.executable, "-c", PARENT, machine.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        killed = time.monotonic()
        assert parent.stdout.read() == ""  # the end: nobody holds the pipe any more
    assert time.monotonic() - killed < 20  # and not when what it does is done


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such call")
def test_an_orphan_ends_itself_and_what_it_starts_has_another_parent(monkeypatch):
    killed = []
    monkeypatch.setattr(machine.os, "kill", lambda *given: killed.append(given))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setenv(machine.ENDS_WITH_PARENT, str(os.getppid()))
    machine.end_with_parent()
    assert not killed
    assert machine.ENDS_WITH_PARENT not in os.environ
    monkeypatch.setenv(machine.ENDS_WITH_PARENT, "1234567")
    machine.end_with_parent()
    assert killed == [(os.getpid(), signal.SIGTERM)]


def test_a_missing_file_and_no_worker_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Sweep.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="at least 1"):
        run_sweep(Sweep(models=("a",), recipes=("b",)), tmp_path, workers=0)


def test_cells_have_folders_of_their_own():
    asked = Sweep(
        models=("a:b", "c/d.py:e"),
        recipes=("gdfq", "gdfq+ait"),
        bits=("w4a4", "w3a3"),
        seeds=(0, 1),
    )
    folders = [cell.folder for cell in asked.cells()]
    assert len(set(folders)) == len(folders) == 16
    assert not any("/" in folder or ":" in folder for folder in folders)


def test_ray_that_is_not_installed_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_sweep(tmp_path, "[genie]")
    code, _, err = zsq(monkeypatch, capsys, "sweep", file, "-o", tmp_path / "out", "--ray", "local")
    assert code == 2
    assert "pip install zsq[ray]" in err


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_sweep_on_a_local_ray_fills_the_same_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray", reason="Ray is not installed: pip install zsq[ray]")
    file, out = write_sweep(tmp_path, "[nonsense, genie]"), tmp_path / "out"
    options = ["sweep", file, "-o", out, "--workers", 2, "--quiet"]
    code, text, _ = zsq(monkeypatch, capsys, *options, "--ray", "local")
    assert code == 1
    assert "1 of 2 cells failed" in text
    table = (out / "results.json").read_text()
    assert [row["status"] for row in json.loads(table)] == ["failed", "done"]
    student = out / json.loads(table)[1]["folder"] / "student.safetensors"
    before = student.stat().st_mtime_ns
    for ray in (["--ray", "local"], []):  # there or here, what is finished is not done again
        zsq(monkeypatch, capsys, *options, *ray)
        assert (out / "results.json").read_text() == table
    assert student.stat().st_mtime_ns == before


@pytest.mark.filterwarnings("default")
def test_a_cluster_that_does_not_answer_and_one_without_gpus_are_refused(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install zsq[ray]")
    asked = Sweep(models=("a",), recipes=("b",), options=("--device=cuda",))
    with pytest.raises(RunError, match="GPU"):
        run_sweep(asked, tmp_path, ray="local")
    with pytest.raises(RunError, match="ray start"):
        run_sweep(asked, tmp_path, ray="nonsense")


class FakeRay:
    """A cluster of two machines that does a task when it is asked for the result."""

    class RayError(Exception):
        """A task was lost."""

    def __init__(self, cores=(8, 4), gpus=0):
        self.cores, self.gpus, self.given, self.most = cores, gpus, [], 0
        self.exceptions, self.open = self, 0

    def init(self, address, **options):
        if address != "auto":
            raise ConnectionError("nobody there")

    def shutdown(self):
        self.given.append("shutdown")

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": float(c)}} for c in self.cores]

    def cluster_resources(self):
        return {"GPU": float(self.gpus)} if self.gpus else {}

    def remote(self, function):
        self.function = function
        return self

    def options(self, **options):
        self.given.append(options)
        cluster = self

        class Task:
            @staticmethod
            def remote(*arguments):
                cluster.open += 1
                cluster.most = max(cluster.most, cluster.open)
                return arguments

        return Task

    def wait(self, tasks, num_returns):
        return tasks[:1], tasks[1:]

    def get(self, task):
        self.open -= 1
        return self.function(*task)


def test_tasks_share_the_cores_out_and_no_more_run_than_asked(monkeypatch):
    cluster = FakeRay(gpus=2)
    monkeypatch.setitem(sys.modules, "ray", cluster)
    work = lambda item, threads: {"item": item, "threads": threads}  # noqa: E731
    done = list(run_on_ray(work, list("abcde"), "auto", workers=3, gpus=1))
    assert done == [(item, {"item": item, "threads": 4}) for item in "abcde"]
    assert cluster.given == [{"num_cpus": 4, "num_gpus": 1}, "shutdown"]
    assert cluster.most == 3
    (_, row), *_ = run_on_ray(work, ["a"], "auto", workers=1, gpus=0)
    assert row["threads"] == 8  # no task is spread over machines


def test_a_task_that_is_lost_is_a_failed_cell(monkeypatch):
    def lost(item, threads):
        raise FakeRay.RayError("the node died")

    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    ((_, row),) = run_on_ray(lost, ["a"], "auto", workers=1, gpus=0)
    assert row == {"status": "failed", "error": "the task was lost: the node died"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--device=cuda"], {"3", "5"}), (["--device", "cuda"], {"3", "5"}), (["--device=cuda:1"], {None}),
     ([], {None})],
)  # fmt: skip
def test_local_workers_share_out_the_gpus(tmp_path, monkeypatch, options, expected):
    seen, both = [], threading.Barrier(2, timeout=20)

    def run(command, *, env, **named):
        both.wait()  # two cells at a time
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.CompletedProcess(command, 1, "", "no more of it")

    visible = {"CUDA_VISIBLE_DEVICES": "3,5"} if expected != {None} else {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in visible.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "run", run)
    file = write_sweep(tmp_path, "[genie]", "[0, 1, 2, 3]", more=options)
    rows = run_sweep(Sweep.load(file), tmp_path / "out", workers=2)
    assert [row["error"] for row in rows] == ["no more of it"] * 4
    assert set(seen) == expected
    assert all(seen.count(gpu) == 4 / len(expected) for gpu in expected)


def test_an_interrupted_sweep_begins_no_further_cell():
    begun, going_on = [], threading.Event()

    def work(cell, threads, gpu):
        begun.append(cell)
        assert len(begun) == 1 or going_on.wait(20)
        return {}

    done = _locally(work, list("abcdef"), 1, [])
    assert next(done) == ("a", {})
    threading.Timer(0.2, going_on.set).start()
    done.close()  # as an exception does, Ctrl-C among them
    assert len(begun) <= 2
