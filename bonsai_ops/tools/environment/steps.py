"""Steps of the preparation: a finished one leaves a stamp that says what it installed and is not run again."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .places import SetupError, environment_path, home, interpreter
from .processes import Tick, call_quietly, run_logged, say, show_tail

FOUND_NOTHING = re.compile(r"No matching distribution|Could not find a version")
FULL = r"No space left|not enough space|Errno 28|WinError 112|File too large|Disk quota exceeded"
FREE = "the disk is full; free 7 GB or name another folder in the environment variable BONSAI_HOME"
LEAST_FREE = 1_000_000
UNREACHABLE = (
    "the package index could not be reached; check the network and proxy settings and run again, it goes on where it "
    "stopped"
)


@dataclass(frozen=True)
class Step:
    """`run` does what `is_done` then reports; it calls its argument about once a second."""

    title: str
    is_done: Callable[[], bool]
    run: Callable[[Tick], None]


def perform(step: Step, label: str) -> None:
    """Run one step unless it is done; prints the label, then the seconds it took."""
    if step.is_done():
        say(f"{label}: done before")
        return
    start = time.monotonic()
    is_terminal = sys.stderr.isatty()

    def tick() -> None:
        if is_terminal:
            say(f"\r{label} ... {time.monotonic() - start:.0f} s", end="")

    say(f"{label} ...", end="")
    try:
        step.run(tick)
    except BaseException:
        say("")
        raise
    say(f"\r{label} ... {time.monotonic() - start:.0f} s" if is_terminal else f" {time.monotonic() - start:.0f} s")


def _stamp(name: str) -> Path:
    return environment_path() / "stamps" / f"{name}.txt"


def _has_stamp(name: str, content: str) -> bool:
    try:
        return _stamp(name).read_text("utf-8") == content
    except OSError:
        return False


def _write_stamp(name: str, content: str) -> None:
    file = _stamp(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content.encode())
    temporary.replace(file)


def venv_step() -> Step:
    """Makes the venv that the other steps install into."""
    return Step("private Python environment", _venv_is_done, _create_venv)


def _venv_is_done() -> bool:
    env = environment_path()
    return _has_stamp("venv", f"{env}\n") and call_quietly([str(interpreter(env)), "-c", "import pip"]) == 0


def _create_venv(tick: Tick) -> None:
    env, log = environment_path(), home() / "venv.log"
    command = [sys.executable, "-m", "venv", str(env)]
    if run_logged(command, log, tick, clear=env) != 0:  # it was half made or moved, or its base Python is gone
        cure = "install its venv and pip modules (on Debian: python3-venv) or use another Python"
        if _is_full(show_tail(log)):
            cure = FREE
        raise SetupError(f"{sys.executable} could not create a virtual environment (see {log}): {cure}.")
    _write_stamp("venv", f"{env}\n")


def pip_step(name: str, title: str, requirements: Callable[[], Sequence[str]], *options: str) -> Step:
    """Installs `requirements` with pip; runs again when they or the options change."""

    def content() -> str:
        return "\n".join((*options, *requirements(), ""))

    def is_done() -> bool:
        with contextlib.suppress(OSError):  # the requirements may come from a file of an earlier step
            return _has_stamp(name, content())
        return False

    def run(tick: Tick) -> None:
        file = environment_path() / f"requirements-{name}.txt"
        file.write_bytes("\n".join((*requirements(), "")).encode())
        pip(["install", *options, "-r", str(file)], tick)
        _write_stamp(name, content())

    return Step(title, is_done, run)


def folder_step(title: str, folder: Path, requirements: Sequence[str]) -> Step:
    """Installs `requirements`, without what they ask for, into a folder for PYTHONPATH; renewed when they change."""
    stamp = folder / ".bonsai-packages"
    content = "\n".join((*requirements, ""))

    def is_done() -> bool:
        return stamp.is_file() and stamp.read_text("utf-8") == content

    def run(tick: Tick) -> None:
        temporary = folder.with_name(f"{folder.name}.part")
        for path in (folder, temporary):
            if path.exists():
                shutil.rmtree(path)
        temporary.mkdir(parents=True)
        file = temporary / stamp.name  # pip takes hashes from a file only
        file.write_bytes(content.encode())
        pip(["install", "--no-deps", "--target", str(temporary), "-r", str(file)], tick)
        temporary.rename(folder)

    return Step(title, is_done, run)


def pip(arguments: Sequence[str], tick: Tick) -> None:
    """Run pip of the private environment; its output goes to pip.log there. Raises SetupError."""
    env = environment_path()
    log = env / "pip.log"
    command = [
        str(interpreter(env)),
        "-m",
        "pip",
        *arguments,
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    if run_logged(command, log, tick) != 0:
        tail = show_tail(log)
        if _is_full(tail):
            cause = FREE
        else:
            cause = UNREACHABLE if FOUND_NOTHING.search(tail) and not _reaches_index(log, tick) else explain(tail)
        raise SetupError(f"pip {arguments[0]} failed: {cause} (whole log: {log}).")


def _is_full(tail: str) -> bool:
    """Whether a command failed for want of room, by the end of its log or where there was no room for that either."""
    return bool(re.search(FULL, tail)) or shutil.disk_usage(home()).free < LEAST_FREE


def _reaches_index(log: Path, tick: Tick) -> bool:
    """Whether pip finds itself in the package index, which has it for every Python: without a network it finds nothing.

    Where pip does not try again, it says no more of an index that it could not reach.
    """
    before = log.stat().st_size
    command = [str(interpreter(environment_path())), "-m", "pip", "index", "versions", "pip", "--no-input"]
    return (
        run_logged(command, log, tick) == 0
        or FOUND_NOTHING.search(log.read_bytes()[before:].decode("utf-8", "replace")) is None
    )


def explain(tail: str) -> str:
    """The cause of a failed pip and its cure, from the last lines of its output."""
    causes = (
        (
            r"THESE PACKAGES DO NOT MATCH THE HASHES",
            "a download is not the expected file; delete the downloads folder "
            "and run again, and if it happens again check the configured package index",
        ),
        (
            r"NewConnectionError|Temporary failure|timed out|ConnectTimeout|ConnectionReset|ProxyError|SSLError",
            UNREACHABLE,
        ),
        (
            FOUND_NOTHING.pattern,
            f"a package has no build for Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}; use a 64-bit Python 3.10 to 3.13",
        ),
    )
    return next((cure for pattern, cure in causes if re.search(pattern, tail)), "see the lines above; then run again")
