"""One case: a reader let loose on changed files, in a process of its own that is watched and limited."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from bonsai_ops.weights.errors import PackError

from .formats import Format, copied
from .mutate import mutate

SECONDS, WALL_SECONDS = 2.0, 60.0
"""Of the processor, and of the clock, after which it hangs."""
MB = 500
ROOM = 4 << 30
"""Bytes of addresses that a reader may take beyond what it starts with: mapped files are among them."""
LONGEST = 1400
"""Characters of a message without its path."""
CURE = re.compile(
    r"\b(expected|download|use|give|choose|update|put|save|load|allow|wait|convert|report|take it away|get|close)\b",
    re.I,
)
EVENTS = re.compile(
    r"subprocess\.|os\.(system|exec|fork|posix_spawn|spawn|startfile|remove|rename|mkdir|rmdir|chmod|link)"
)
MORE_EVENTS = re.compile(
    r"os\.(symlink|truncate|chown|utime|putenv)|socket\.|shutil\.|urllib\.|ftplib|smtplib|ctypes\.dlopen"
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Verdict:
    """fault: what is wrong, empty if all is well. read: whether it was read. megabytes: more than before."""

    fault: str = ""
    read: bool = False
    seconds: float = 0.0
    megabytes: float = 0.0
    said: str = ""


def run_case(name: str, form: Format, seed_folder: Path, scratch: Path, key: str) -> tuple[Verdict, str]:
    """(what came of a case, how its files were changed). key: what draws the changes."""
    rng = random.Random(key)
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    copied(seed_folder, folder)
    changes: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            changes.append(mutate(folder, rng))
        except Exception:  # what the change before left is beyond this one
            changes.append(f"none ({traceback.format_exc(-1).splitlines()[-1]})"[:200])
    target = folder / form.target if form.target else folder
    # torch maps what it opens, and ComfyUI is told by its command line to map: there a process may end
    moving = rng.random() < 0.05 and not form.needs_comfyui and not form.target.endswith(".pt")
    if moving:
        changes.append("while it is read")
    before = _listed(folder)
    mapped = not moving and rng.random() < 0.8
    verdict = _forked(lambda: form.read(target, mapped), folder, (lambda: _move(folder, rng)) if moving else None)
    if not verdict.fault and not moving and _listed(folder) != before:
        verdict.fault = "files were written"
    return verdict, ", ".join(changes)


def _move(folder: Path, rng: random.Random) -> None:
    """Cuts files off, writes into them and puts others in their place until it is ended."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 64 << 20]
    raw = {path: path.read_bytes() for path in files}
    while files:
        path = rng.choice(files)
        size = len(raw[path])
        kind = rng.randrange(3)
        if kind == 0:
            os.truncate(path, rng.randrange(size + 1))
        elif kind == 1:
            path.write_bytes(raw[path])
        else:
            path.with_name("new").write_bytes(raw[path][: size // 2])
            path.with_name("new").replace(path)
        time.sleep(0.002)


def _listed(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def _forked(read: Callable[[], object], folder: Path, beside: Callable[[], None] | None) -> Verdict:
    mover = os.fork() if beside else -1
    if not mover:
        try:
            beside()
        finally:
            os._exit(0)
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        _inside(read, folder, into)
    os.close(into)
    raw, until = b"", time.monotonic() + WALL_SECONDS
    while select.select([out], [], [], max(0.0, until - time.monotonic()))[0]:
        if not (piece := os.read(out, 1 << 16)):
            break
        raw += piece
    hung = time.monotonic() >= until
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(out)
    if mover > 0:
        os.kill(mover, signal.SIGKILL)
        os.waitpid(mover, 0)
    if raw:
        return Verdict(**json.loads(raw))
    return Verdict(f"hung for {WALL_SECONDS:.0f} s" if hung else f"ended by signal {os.WTERMSIG(status)}")


def _inside(read: Callable[[], object], folder: Path, into: int) -> NoReturn:
    """The child: limits, watch, reader, verdict."""
    verdict, seen = Verdict(), []
    try:
        gc.disable()
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + ROOM, here + ROOM))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        memory, started = _peak(), time.process_time()
        sys.addaudithook(lambda event, arguments: _watch(seen, event, arguments))
        try:
            read()
            verdict.read = True
        except PackError as error:
            verdict.said = str(error)
            verdict.fault = _wrong_message(verdict.said, folder)
        except BaseException as error:
            verdict.said = f"{type(error).__name__}: {error}"[:2000]
            verdict.fault = "another exception\n" + "".join(traceback.format_exception(error))[-3000:]
        seen = list(seen)
        verdict.seconds, verdict.megabytes = time.process_time() - started, (_peak() - memory) / 1e6
        if not verdict.fault:
            verdict.fault = _excess(verdict, seen)
    finally:
        os.write(into, json.dumps(asdict(verdict)).encode()[: 1 << 16])
        os._exit(0)


def _watch(seen: list[str], event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES and path not in (os.devnull,):
            seen.append(f"open {path!r} to write")
    elif EVENTS.match(event) or MORE_EVENTS.match(event):
        seen.append(f"{event} {arguments!r}"[:200])


def _peak() -> float:
    """Bytes that were held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _excess(verdict: Verdict, seen: list[str]) -> str:
    if seen:
        return f"it did more than read: {'; '.join(seen[:3])}"
    if verdict.megabytes > MB:
        return f"took {verdict.megabytes:.0f} MB"
    if verdict.seconds > SECONDS:
        return f"took {verdict.seconds:.1f} s"
    return ""


def _wrong_message(text: str, folder: Path) -> str:
    """What a message lacks: one printable line that begins with a file of the case and says what to do."""
    if not text.startswith(str(folder)):
        return "a message that names no file"
    if not text.isprintable() or len(text) > LONGEST + 300:
        return "a message that is no line"
    if not text.endswith(".") or not CURE.search(text):
        return "a message without a cure"
    return ""
