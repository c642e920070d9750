# SPDX-License-Identifier: Apache-2.0
"""The folder of a run, without a run."""

import errno
import fcntl
import json
import shutil
import subprocess
import sys

import pytest

from zsq.artifact.runfolder import RunFolder
from zsq.errors import UsageError

IDENTITY = {"model": "net.pt2", "recipe": {"name": "genie"}, "seed": 0}


def test_what_a_kill_left_in_the_first_write_is_no_obstacle(tmp_path):
    (tmp_path / ".run.json.0123abcd.tmp").write_text("{")
    folder = RunFolder.start(tmp_path, IDENTITY, resume=True)
    assert folder.record["status"] == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_a_kill_left_later_is_deleted_when_the_run_goes_on(tmp_path):
    folder = RunFolder.start(tmp_path, IDENTITY, resume=False)
    folder.file("checkpoints").mkdir()
    left = [folder.file(".run.json.0123abcd.tmp"), folder.file("checkpoints") / ".a.0123abcd.tmp"]
    for path in left:
        path.write_text("{")
    with pytest.raises(UsageError, match="another process is working on"):
        RunFolder.start(tmp_path, IDENTITY, resume=True)
    assert all(path.exists() for path in left), "they may be another process's"
    folder.release()
    RunFolder.start(tmp_path, IDENTITY, resume=True)
    assert not any(path.exists() for path in left)


def test_hidden_files_of_others_are_not_touched(tmp_path):
    (tmp_path / ".thesis.tmp").write_text("all of it")
    with pytest.raises(UsageError, match="not an empty folder"):
        RunFolder.start(tmp_path, IDENTITY, resume=False)
    assert (tmp_path / ".thesis.tmp").exists()


@pytest.mark.parametrize("change", [
    {"identity": {}}, {"identity": {"model": "a"}}, {"identity": {"model": "a", "recipe": 3}},
    {"identity": None}, {"results": 3}, {"timings": []}, {"environment": "a"},
])  # fmt: skip
def test_a_damaged_record_that_is_json_is_refused(tmp_path, change):
    RunFolder.start(tmp_path, IDENTITY, resume=False)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | change))
    for use in (RunFolder.open, lambda path: RunFolder.start(path, IDENTITY, resume=True)):
        with pytest.raises(UsageError, match=r"run\.json is damaged"):
            use(tmp_path)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints", "analysis", "recipe.yaml", "analysis/plots/a.png"]
)
def test_a_run_that_leads_elsewhere_is_refused_and_nothing_there_is_touched(tmp_path, name):
    """What a stranger's folder links to would be written to, deleted, or shown in a report."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    RunFolder.start(run, IDENTITY, resume=False).release()
    outside.mkdir()
    (outside / ".tmpabcdef").write_text("mine")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(outside)
    for use in (RunFolder.open, lambda path: RunFolder.start(path, IDENTITY, resume=True)):
        with pytest.raises(UsageError, match="is a link; a run's files are its own"):
            use(run)
    assert (outside / ".tmpabcdef").read_text() == "mine"


def test_records_that_windows_editors_saved_are_read(tmp_path):
    RunFolder.start(tmp_path, IDENTITY, resume=False).release()
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text("\ufeff" + text, encoding="utf-8")
    assert RunFolder.open(tmp_path).record == json.loads(text)


def test_only_a_run_that_was_begun_for_nothing_is_withdrawn(tmp_path):
    begun = RunFolder.start(tmp_path / "run", IDENTITY, resume=False)
    begun.write_text("recipe.yaml", "")
    begun.release()
    RunFolder.start(tmp_path / "run", IDENTITY, resume=True).withdraw()  # not begun by this one
    assert begun.file("run.json").exists()
    begun.write_text("images.safetensors", "")
    begun.withdraw()
    assert begun.file("run.json").exists()
    begun.file("images.safetensors").unlink()
    begun.withdraw()
    assert not list(begun.path.iterdir())


HOLD = """
import sys, time
from zsq.artifact.runfolder import RunFolder
folder = RunFolder.start(sys.argv[1], {"model": "net.pt2", "recipe": {"name": "genie"}, "seed": 0}, resume=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_whose_folder_is_gone_is_withdrawn_without_a_word(tmp_path):
    folder = RunFolder.start(tmp_path / "run", {}, resume=False)
    shutil.rmtree(tmp_path / "run")
    folder.withdraw()
    assert not (tmp_path / "run").exists()


def test_one_process_at_a_time_works_on_a_run_and_a_killed_one_is_in_nobodys_way(tmp_path):
    RunFolder.start(tmp_path, IDENTITY, resume=False).release()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=r"another process is working on .* --resume"):
            RunFolder.start(tmp_path, IDENTITY, resume=True)
        assert RunFolder.open(tmp_path).record["status"] == "running", "looking is free"
    finally:
        other.kill()
        other.communicate()
    RunFolder.start(tmp_path, IDENTITY, resume=True)


def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for resume in (False, True):
        assert RunFolder.start(tmp_path, IDENTITY, resume=resume).lock is None


def test_a_run_that_is_being_made_is_said_to_be(tmp_path):
    RunFolder.start(tmp_path, IDENTITY, resume=False)
    with pytest.raises(UsageError, match="another process is working on"):
        RunFolder.start(tmp_path, IDENTITY, resume=False)


def test_another_spelling_of_the_same_network_is_the_same_run(tmp_path):
    one = IDENTITY | {"model": "net.py:f", "network": "0123"}
    RunFolder.start(tmp_path, one, resume=False).release()
    RunFolder.start(tmp_path, one | {"model": "./net.py:f"}, resume=True).release()
    with pytest.raises(UsageError, match="another run"):
        RunFolder.start(tmp_path, one | {"network": "4567"}, resume=True)
    with pytest.raises(UsageError, match="this run already"):  # and nothing is left locked
        RunFolder.start(tmp_path, one, resume=False)
