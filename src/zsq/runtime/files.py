# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a kill or a full disk never leaves half a file behind."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from zsq.errors import RunError, UsageError

#: Names of the files that `atomic_write` has its blocks write to.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
#: Names of the files that safetensors writes to, beside the one it was told to write.
_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    Args:
        path: the file to create or replace.

    Yields:
        An empty file to write to, in the same folder (so that the rename is atomic).

    Raises:
        RunError: the disk is full or the folder cannot be written; ``path`` is as it was before.
            Failures to write that safetensors and ``torch.save`` report in their own way count too.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # O_EXCL: never write through a link that somebody put there. The umask applies as usual.
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        os.chmod(temporary, mode)  # safetensors puts a file of its own there, for the owner only
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except Exception as error:
        if not _is_failed_write(error, path.parent):
            raise
        raise RunError(
            f"cannot write {path}: {_reason(error)}. What was there before is untouched; free some space or "
            "make the folder writable, then run the command again (`quantize` with --resume)."
        ) from error
    finally:
        with suppress(OSError):  # the folder may be what is missing
            temporary.unlink(missing_ok=True)


def lock_folder(folder: Path) -> int | None:
    """Keep other processes from working in a folder, until `unlock_folder` or the end of this one.

    Returns:
        What `unlock_folder` takes; None on a file system that has no locks.

    Raises:
        UsageError: another process works there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError(
            f"another process is working on {folder}; wait until it ends, or stop it, then run the command "
            "again with --resume."
        ) from error
    except OSError:
        os.close(handle)
        return None
    return handle


def unlock_folder(lock: int | None) -> None:
    """Let other processes work in a folder again."""
    if lock is not None:
        os.close(lock)


def is_leftover(path: Path) -> bool:
    """Return whether a file is what a process left that was killed while it wrote.

    Example:
        >>> is_leftover(Path("run/.run.json.0123abcd.tmp")), is_leftover(Path("run/.mine.tmp"))
        (True, False)
    """
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left in a folder of zsq's own; no other may be writing there."""
    for path in folder.glob(".*"):
        if is_leftover(path) or _SAFETENSORS.fullmatch(path.name):
            with suppress(OSError):  # it is in nobody's way
                path.unlink()


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, where there is none.

    Raises:
        UsageError: a file is in the way, or no folder may be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {path}: {error.strerror}; choose another with -o."
        ) from error
    if not is_writable(path):
        raise UsageError(
            f"the folder {path} is not writable; make it so, or choose another with -o."
        )


def check_folder(path: Path) -> None:
    """Find out before the work that `make_folder` will fail, and make nothing.

    Raises:
        UsageError: a file is in the way, or no folder may be made there.
    """
    nearest = path
    # Unlike `exists`, this also says no of what may not be looked at, and yes of a link to nothing.
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        what = "points to nothing" if nearest.is_symlink() and not nearest.exists() else "is a file"
        raise UsageError(
            f"cannot make the folder {path}: {nearest} {what}; choose another with -o."
        )
    if not is_writable(nearest):
        raise UsageError(
            f"the folder {nearest} is not writable; make it so, or choose another with -o."
        )


def check_destination(path: Path, endings: tuple[str, ...] = ()) -> None:
    """Find out before the work that its result cannot be written.

    Args:
        path: of the file.
        endings: that its name may have, all that it may; any if none are given.

    Raises:
        UsageError: the path is a folder, or its folder does not exist or cannot be written, or the name would be
            that of another kind of file, which could be there already.
    """
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; give the name of a file.")
    if endings and path.suffix.lower() not in endings:
        raise UsageError(
            f"cannot write {path}: give the file a name that ends in {' or '.join(endings)}."
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"cannot write {path}: there is no folder {path.parent}; create it, or choose another."
        )
    if not is_writable(path.parent):
        raise UsageError(
            f"cannot write {path}: the folder {path.parent} is not writable; make it so, or choose another."
        )


def _flush_to_disk(path: Path) -> None:
    """Wait until the content is on the disk: some file systems report that they are full only now.

    It also keeps a power cut after the rename from leaving an empty file under the final name.
    """
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_failed_write(error: Exception, folder: Path) -> bool:
    """Tell a failure to write into ``folder`` from whatever else went wrong in the block."""
    if isinstance(error, OSError):
        # A file name elsewhere means that the block failed to read something.
        return not isinstance(error.filename, str | os.PathLike) or (
            Path(error.filename).parent == folder
        )
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    # torch.save has no error type of its own; its C++ writer is in inline_container.cc.
    return isinstance(error, RuntimeError) and "inline_container.cc" in str(error)


def _reason(error: Exception) -> str:
    """Say in a few words what the operating system refused."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    return "the file could not be written to its end, so the disk is probably full"
