"""A lock file between processes, safe against owners that ended."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .processes import say

_LOCK_BEAT_SECONDS = 10.0
_LOCK_STALE_SECONDS = 120.0


@contextlib.contextmanager
def hold_lock(file: Path, poll: float = 1.0) -> Iterator[None]:
    """Hold a lock file, waiting while a living process has it.

    The file holds "pid host" and is touched every 10 seconds. It is stale, and taken over, when that process of this
    host has ended or when nobody touched it for two minutes.
    """
    mine = f"{os.getpid()} {socket.gethostname()}\n"
    announced = False
    while not _create_lock(file, mine):
        if _remove_stale_lock(file):
            continue
        if not announced:
            say(f"Another run is preparing {file.parent} (process and host: {_lock_owner(file).strip()}); waiting.")
            announced = True
        time.sleep(poll)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_LOCK_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _lock_owner(file) == mine:
            file.unlink(missing_ok=True)


def _create_lock(file: Path, content: str) -> bool:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    except PermissionError:
        if sys.platform == "win32" and file.parent.is_dir():  # the old file is just being deleted
            return False
        raise
    with os.fdopen(handle, "wb") as stream:
        stream.write(content.encode())
    return True


def _lock_owner(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _remove_stale_lock(file: Path) -> bool:
    """Remove the lock if its owner is gone; True when it is worth trying again at once."""
    owner = _lock_owner(file)
    try:
        age = time.time() - file.stat().st_mtime
    except OSError:
        return True
    pid, _, host = owner.strip().partition(" ")
    ended = host == socket.gethostname() and pid.isdecimal() and not _is_running(int(pid))
    if not ended and age < _LOCK_STALE_SECONDS:
        return False
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.replace(aside)
        if _lock_owner(aside) != owner:  # another process took it over in between: give it back
            aside.replace(file)
            return False
        aside.unlink()
    except OSError:
        return False
    return True


def _is_running(pid: int) -> bool:
    """Whether a process with this id runs on this host; this process itself counts as not running."""
    if pid == os.getpid():
        return False
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        query_limited_information, still_active = 0x1000, 259
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = wintypes.HANDLE
        kernel.OpenProcess.argtypes = (wintypes.DWORD, wintypes.BOOL, wintypes.DWORD)
        kernel.GetExitCodeProcess.argtypes = (wintypes.HANDLE, ctypes.POINTER(wintypes.DWORD))
        kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
        handle = kernel.OpenProcess(query_limited_information, False, pid)
        if not handle:
            return ctypes.get_last_error() == 5  # access denied: it exists
        code = wintypes.DWORD()
        known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return not known or code.value == still_active
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
