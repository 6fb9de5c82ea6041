"""Writing a file that is complete or absent, whatever ends the writing.

It grows beside its target under a hidden name of its own, a short one: the target's may have all the letters that a
name can have. A process that is killed leaves that file, and whoever next writes into the folder takes it away: what is
being written is locked (flock) until its process ends, on Windows nothing deletes a file that is open, and where locks
are not passed on to other machines it has been touched within STALE_SECONDS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import PackError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PREFIX, SUFFIX = ".bonsai-", ".part"
STALE_SECONDS = 60
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
MB = 1_000_000
MAKE_ROOM = "Free some room on that disk or choose another folder."
OTHER_NAME = "Choose another name or remove it first."


@contextlib.contextmanager
def new_file(path: Path, size: int, overwrite: bool = False) -> Iterator[tuple[BinaryIO, Path]]:
    """(an open, empty file, its name for now). At the end it is closed and becomes `path`, at once or not at all.

    size: bytes that will be written. It may be closed inside, to be read under its name for now. An exception ends the
    writing and leaves nothing behind. Of two that write one path without `overwrite`, one gets it.
    Raises PackError if `path` exists and not `overwrite`, if it may not be written or there is no room; OSError.
    """
    try:
        _require_free(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        _take_away_left(path.parent)
        _require_room(path, size)
    except OSError as error:
        raise _not_written(path, size, error) from error
    temporary, lock = path.parent / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}", None
    try:  # from before the file is there: what ends the writing may come at any moment
        try:
            out, lock = _made(temporary)
        except OSError as error:
            raise _not_written(path, size, error) from error
        with out:
            yield out, temporary
        os.chmod(temporary, 0o644)
        _name(temporary, path, overwrite)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in FULL:
            raise _not_written(path, size, error) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _require_free(path: Path, overwrite: bool) -> None:
    """Raises PackError for a path that is taken, OSError for one that no file can have."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    if not overwrite:
        raise PackError(path, "exists", OTHER_NAME)


def _require_room(path: Path, size: int) -> None:
    total, _, free = shutil.disk_usage(path.parent)
    if total and size > free:  # some network folders say that they have none at all
        raise PackError(path, f"needs {size / MB:,.1f} MB, and {free / MB:,.1f} MB are left for it", MAKE_ROOM)


def _not_written(path: Path, size: int, error: OSError) -> PackError:
    said = error.strerror or str(error)
    if error.errno in FULL:
        return PackError(path, f"needs {size / MB:,.1f} MB, and there is no room for it ({said})", MAKE_ROOM)
    return PackError(path, f"cannot be written ({said})", "Choose another name or folder, or allow it to be written.")


def _made(path: Path) -> tuple[BinaryIO, int | None]:
    """(a new file, what keeps it locked after it is closed)."""
    while True:
        out = path.open("xb")
        if fcntl is None:
            return out, None
        with contextlib.suppress(OSError):  # a folder that knows no locks: then nobody gets one
            fcntl.flock(out, fcntl.LOCK_EX)
        if os.fstat(out.fileno()).st_nlink:  # else another took it away before it was locked
            return out, os.dup(out.fileno())
        out.close()


def _take_away_left(folder: Path) -> None:
    """Deletes what ended processes left."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > STALE_SECONDS:
                _take_away(path)


def _take_away(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(handle)


def _name(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives a file its name. Raises PackError if that is taken and not `overwrite`."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except (OSError, AttributeError):
            # no links here: the name is taken first, by a file that is empty for a moment
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            try:
                os.replace(temporary, path)
            except BaseException:
                os.unlink(path)
                raise
            return
    except FileExistsError as error:
        raise PackError(path, "exists", "It appeared while this file was written: choose another name.") from error
    os.unlink(temporary)
