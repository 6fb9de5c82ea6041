"""What lies under a path, before anything of it is opened: a pipe would wait for ever, a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .errors import PackError

GONE = "Put the pack under models/bonsai and refresh the page."
NO_ACCESS = "Allow the user that runs ComfyUI to read it: the file itself may be whole."
MACHINES = {
    errno.ENOMEM: "Close other programs, or free ComfyUI's memory, and try again: the file itself may be whole.",
    errno.EMFILE: "Restart ComfyUI, or allow its user more open files: the file itself may be whole.",
    errno.ENFILE: "Close other programs: the file itself may be whole.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Put the file itself in the place of the link, which leads back to itself.",
    errno.EIO: "Check the disk or the network folder, and copy the file to another: what was read may be damaged.",
}
"""{what the system answers when the fault is none of the file's: what helps}."""
KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def is_file(path: Path) -> bool:
    """Whether a file is there that can be looked at; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a path that was chosen is a folder. Raises PackError for nothing and for what may not be looked at."""
    return stat.S_ISDIR(_status(path).st_mode)


def file_size(path: Path) -> int:
    """Bytes of a file that may be read. Raises PackError for anything else, and opens nothing that is no file."""
    status = _status(path)
    if stat.S_ISDIR(status.st_mode):
        raise PackError(path, "is a folder", "Expected a file: choose one in it, or a folder of a whole release.")
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in KINDS if is_kind(status.st_mode)), "something else")
        raise PackError(path, f"is no file but {kind}", "Put the file of the pack in its place.")
    try:
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size


def stamp(path: Path) -> tuple[str, int, int, int]:
    """(place, bytes, times of the last change of content and of anything) of a file: other content, another stamp.

    Raises OSError.
    """
    place = os.path.realpath(path)
    status = Path(place).stat()
    return place, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def unreadable(path: Path, error: OSError) -> PackError:
    """The error for a file that the system does not hand over."""
    return not_its_fault(path, error) or PackError(path, f"cannot be read ({error.strerror or error})", NO_ACCESS)


def not_its_fault(path: Path, error: BaseException) -> PackError | None:
    """The error for a file that is gone or where memory, handles or the disk failed, None for all else.

    Libraries hand on what the system answered as text alone.
    """
    if isinstance(error, FileNotFoundError):
        return PackError(path, "does not exist", GONE)
    for number, cure in MACHINES.items():
        said = os.strerror(number)
        if getattr(error, "errno", None) == number or said in str(error):
            return PackError(path, f"cannot be read ({said})", cure)
    return None


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # a name with a zero in it
        raise PackError(path, f"is no name of a file ({error})", "Choose the file again.") from error
