"""Other processes: their environment variables, their output in a log file, or attached to this terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .places import PLUGIN

if TYPE_CHECKING:
    from types import FrameType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Tick = Callable[[], None]
_LOG_TAIL_LINES = 30
_RUN_MODULE = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for another interpreter: without the module paths of this one, text output as UTF-8."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    variables = {name: value for name, value in os.environ.items() if name not in dropped}
    variables["PYTHONIOENCODING"] = "utf-8"
    return {**variables, **(extra or {})}


def inherited_environment() -> dict[str, str]:
    """Environment variables for another process of this same interpreter: its module paths stay.

    What BONSAI_PACKAGES names comes first among them.
    """
    variables = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    folders = [folder for folder in (variables.get("BONSAI_PACKAGES"), variables.get("PYTHONPATH")) if folder]
    if folders:
        variables["PYTHONPATH"] = os.pathsep.join(folders)
    return variables


def module_command(module: str, python: Path | str = sys.executable) -> list[str]:
    """The command that runs a module of this plugin; its arguments follow.

    Not `python -m`, which finds nothing of ours in a Python that keeps its own list of folders, as the Windows portable
    build of ComfyUI does.
    """
    return [str(python), "-c", _RUN_MODULE, str(PLUGIN), module]


def run_attached(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> int:
    """Run a command on this terminal and return its exit code; 130 after an interrupt from the keyboard."""
    with subprocess.Popen(command, env=dict(env), cwd=cwd) as process:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the terminal has sent it to the child as well: let it finish
                continue
            return 130 if code < 0 and -code == 2 else code


def call_quietly(command: Sequence[str]) -> int:
    """The exit code of a command whose output nobody wants, -1 if it cannot be started."""
    try:
        return subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
    except OSError:
        return -1


def run_logged(
    command: Sequence[str],
    log: Path,
    tick: Tick,
    clear: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run a command with its output appended to a file and return its exit code; `tick` is called each second.

    clear: a folder that is deleted first. variables: further ones of its environment. Waits for a command that
    an ended run left behind with this log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        _lock_log(output)
        if clear is not None and clear.exists():
            shutil.rmtree(clear)
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        with subprocess.Popen(
            command,
            env=clean_environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(timeout=1)
                    tick()
            except BaseException:
                process.terminate()
                raise


def _lock_log(output: BinaryIO) -> None:
    """Locks a log for as long as this process or a command that writes into it has it open: killing us ends no pip."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # a folder that knows no locks
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f" waiting for what an ended run left running (it writes {output.name})", end="")
            fcntl.flock(output, fcntl.LOCK_EX)


@contextlib.contextmanager
def ending_by_exception() -> Iterator[None]:
    """Within it a signal that ends a program raises SystemExit, so that nothing half-done stays."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    ours = []
    if threading.current_thread() is threading.main_thread():  # signals are set there only
        ours = [number for number in known if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def show_tail(log: Path) -> str:
    """Print the end of a log and return it."""
    tail = tail_of(log, _LOG_TAIL_LINES)
    say("\n" + tail)
    return tail


def tail_of(log: Path, lines: int) -> str:
    """The last lines of a text file, "" when there is none."""
    try:
        text = log.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def say(text: str, end: str = "\n") -> None:
    """Print to stderr at once."""
    print(text, end=end, file=sys.stderr, flush=True)
