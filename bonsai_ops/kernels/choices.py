"""Which of two backends was the faster one on this machine's cards, kept in a file from one start to the next.

The file lies in the folder of Triton's compiled kernels, and a choice in it stays: with the same card and the same file
every run chooses the same.

    {"format": "bonsai choices", "version": 1, "choices": {key: choice, ..}}
    choice: {"faster": "fused" or "unpack", "ms": {"fused": 1.52, "unpack": 1.2}}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..weights.errors import PackError, escaped, shown
from ..weights.json_file import parse_json, read_small
from ..weights.new_file import new_file

if os.name == "nt":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

NAME = "bonsai_choices.json"
FORMAT, VERSION = "bonsai choices", 1
FUSED, UNPACK = "fused", "unpack"
SIDES = (FUSED, UNPACK)
"""A fused kernel; a kernel that unpacks, and the vendor's product."""
MOST_CHOICES = 2000
"""Of a file; the oldest go first. A card, a dtype and a model have about twenty."""
KEY_LENGTH = 300


@dataclass(frozen=True)
class Timed:
    """faster: of SIDES. ms: {side: milliseconds of one product}."""

    faster: str
    ms: Mapping[str, float]


def file_path() -> Path:
    """Where choices are kept."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        return Path(given, NAME)
    home = os.environ.get("TRITON_HOME")
    try:
        return Path(home or Path.home(), ".triton", "cache", NAME)
    except RuntimeError:  # a user without a home, as containers have; Triton takes the same folder then
        return Path("~", ".triton", "cache", NAME)


class Choices:
    """The choices of a file and of this process, read when the first is asked for. Usable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Timed] | None = None

    def find(self, key: str) -> Timed | None:
        """What was chosen for a key, None if nothing was."""
        return self.all().get(key)

    def all(self) -> dict[str, Timed]:
        """{key: choice}, the oldest first. Not to be written to."""
        with self._lock:
            if self._known is None:
                self._known = _read(file_path()) or {}
            return self._known

    def add(self, key: str, timed: Timed) -> Timed:
        """Keeps a choice, in the file too if that can be. Returns the one that holds: another process may have been
        first."""
        path = file_path()
        with self._lock, _one_process(path):
            found = _read(path)
            known = {**(self._known or {}), **(found or {})}
            holds = known.setdefault(key, timed)
            self._known = dict(list(known.items())[-MOST_CHOICES:])
            if found is not None and key not in found:
                _write(path, self._known)
            return holds

    def forget(self) -> bool:
        """Removes the file and what is known in this process; whether there was a file. Raises OSError."""
        path = file_path()
        with self._lock, _one_process(path):
            self._known = None
            there = path.exists()
            path.unlink(missing_ok=True)
            return there


choices = Choices()


@contextlib.contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Within the block no other process changes the file. In a folder that knows no locks the last one that writes
    wins, and what is lost is timed again."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_suffix(".lock").open("ab"))
            if os.name == "nt":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # until the file is closed
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Timed] | None:
    """The choices of the file; none where there is no file or a damaged one, None where it is not ours to change."""
    if not os.path.lexists(path):
        return {}
    try:
        whole = parse_json(read_small(path))
    except PackError as error:
        return _ignored(path, shown(error.found), {})
    except ValueError as error:
        return _ignored(path, f"cannot be read ({shown(str(error))})", {})
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        return _ignored(path, "is no file of choices", None)
    if whole.get("version") != VERSION:
        return _ignored(path, f"has version {shown(str(whole.get('version')), 20)}, expected {VERSION}", None)
    found = whole.get("choices")
    if not isinstance(found, dict) or len(found) > MOST_CHOICES:
        return _ignored(path, "is damaged", {})
    read = {key: _timed(value) for key, value in found.items() if len(key) <= KEY_LENGTH}
    if len(read) < len(found) or None in read.values():
        return _ignored(path, "is damaged", {})
    return read


def _timed(value: Any) -> Timed | None:
    """A choice as it stands in the file; None for anything else."""
    if not isinstance(value, dict) or value.get("faster") not in SIDES or not isinstance(value.get("ms"), dict):
        return None
    ms = {side: value["ms"].get(side) for side in SIDES}
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) and one > 0 for one in ms.values()):
        return None
    return Timed(value["faster"], ms)


_said: set[tuple[Path, str]] = set()


def _ignored(path: Path, why: str, instead: dict[str, Timed] | None) -> dict[str, Timed] | None:
    if (path, why) not in _said:
        _said.add((path, why))
        logger.warning("Bonsai: %s %s, so it is ignored and kernels are timed again", escaped(str(path)), why)
    return instead


def _write(path: Path, known: Mapping[str, Timed]) -> None:
    kept = {key: {"faster": timed.faster, "ms": dict(timed.ms)} for key, timed in known.items()}
    raw = json.dumps({"format": FORMAT, "version": VERSION, "choices": kept}, indent=1).encode()
    try:
        with new_file(path, len(raw), overwrite=True) as (out, _):
            out.write(raw)
    except (PackError, OSError) as error:
        if (path, "write") not in _said:
            _said.add((path, "write"))
            logger.warning("Bonsai: what was timed holds for this run only: %s", error)
