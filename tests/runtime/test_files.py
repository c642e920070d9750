# SPDX-License-Identifier: Apache-2.0
"""A file is there whole or as it was before, whatever happens while it is being written."""

import errno
import os
import resource
import stat
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from zsq.errors import RunError, UsageError
from zsq.runtime.files import (
    atomic_write,
    check_destination,
    check_folder,
    make_folder,
    remove_leftovers,
)


@contextmanager
def file_size_limit(size):
    """Let the operating system refuse to write beyond ``size`` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"before")
    return path


def assert_untouched(target):
    assert target.read_bytes() == b"before"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def write_half_and_raise(target, error):
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"half")
        raise error


def test_replaces_the_file_only_at_the_end_of_the_block(target):
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"after")
        assert temporary.parent == target.parent
        assert target.read_bytes() == b"before"
    assert target.read_bytes() == b"after"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(b""), lambda path: save_file({}, path)],
    ids=["python", "safetensors"],
)  # fmt: skip
def test_creates_a_file_with_the_permissions_of_any_new_file(tmp_path, write):
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    with atomic_write(str(tmp_path / "new")) as temporary:
        write(temporary)
    new = tmp_path / "new"
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_accepts_a_bare_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("bare.txt") as temporary:
        temporary.write_text("here")
    assert (tmp_path / "bare.txt").read_text() == "here"


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_an_error_in_the_block_passes_through_and_leaves_the_old_file(target, error):
    with pytest.raises(type(error)) as caught:
        write_half_and_raise(target, error)
    assert caught.value is error
    assert_untouched(target)


def test_a_full_disk_is_a_run_error_and_leaves_the_old_file(target):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RunError, match=r"weights\.bin: No space left on device.*--resume"):
        write_half_and_raise(target, full)
    assert_untouched(target)


def test_a_disk_that_turns_out_full_when_flushed_is_a_run_error(target, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="No space left"), atomic_write(target) as temporary:
        temporary.write_bytes(b"after")
    assert_untouched(target)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: save_file({"x": torch.zeros(25_000)}, path),
        lambda path: torch.save({"x": torch.zeros(25_000)}, path),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_every_library_that_writes_reports_a_refused_write_as_a_run_error(target, write):
    with (
        pytest.raises(RunError, match=r"cannot write .*weights\.bin"),
        atomic_write(target) as temporary,
        file_size_limit(4096),
    ):
        write(temporary)
    assert_untouched(target)


def test_writes_what_safetensors_saves(tmp_path):
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.arange(5)}, temporary)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(5))


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_folder_that_cannot_hold_the_file_is_a_run_error(tmp_path, parent):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="cannot write"), atomic_write(tmp_path / parent / "a"):
        pytest.fail("the block must not run")


def test_a_target_that_is_a_folder_is_a_run_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match="cannot write"), atomic_write(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_to_read_another_file_is_not_called_a_failure_to_write(target, tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(target):
        (tmp_path / "elsewhere" / "input.txt").read_text()
    assert_untouched(target)


def test_other_errors_of_the_same_type_are_left_alone(target):
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        write_half_and_raise(target, RuntimeError("size mismatch"))
    assert not isinstance(caught.value, RunError)
    assert_untouched(target)


def test_what_killed_writers_left_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, missing_ok=False: None)
    with atomic_write(tmp_path / "a.txt") as temporary:
        left = temporary
    monkeypatch.undo()
    left.write_text("half")
    (tmp_path / ".mine.tmp").write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "a.txt"]


def test_so_is_what_safetensors_left(tmp_path):
    """It writes to a file of its own beside the one it is told, as large as the data."""
    for name in (".tmpJSR6O7", ".tmp", ".tmpfolder-of-mine"):
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp", ".tmpfolder-of-mine"]


def test_a_folder_that_cannot_be_made_is_known_before_the_work(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot make the folder"):
            make_folder(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_that_cannot_be_made_are_found_out_without_making_any(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for place, why in (
        (tmp_path / "file" / "below", "file is a file"),
        (tmp_path / "gone", "gone points to nothing"),
        (tmp_path / "gone" / "below", "gone points to nothing"),
    ):
        with pytest.raises(UsageError, match=why):
            check_folder(place)
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()

    def denied(path, *options, **named):  # for root every folder can be looked into
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "lstat", lambda p: os.stat(p) if p == tmp_path else denied(p))
    with pytest.raises(UsageError, match="is not writable"):
        check_folder(tmp_path / "locked" / "below")


def test_a_place_where_no_file_can_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "missing" / "a", "no folder")):
        with pytest.raises(UsageError, match=says):
            check_destination(path)
    with pytest.raises(UsageError, match=r"ends in \.html or \.htm"):
        check_destination(tmp_path / "page.md", (".html", ".htm"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root everything is writable
    with pytest.raises(UsageError, match="not writable"):
        check_destination(tmp_path / "a")
