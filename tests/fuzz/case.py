"""One case: a reader let loose on changed files, in a process that is watched and limited."""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from bonsai_ops.weights.errors import GAP, PackError, shown

from .formats import Format, copied
from .mutate import mutate

SECONDS, WALL_SECONDS = 2.0, 60.0
"""Of the processor, and of the clock, after which it hangs."""
MB = 500
CASES, KEPT = 100, 64 << 20
"""Read by one process at most; bytes that it may still hold after a case, before the next gets another process."""
ROOM = 4 << 30
"""Bytes of addresses that a reader may take beyond what it starts with: mapped files are among them."""
LONGEST = 1400
"""Characters of a message without its path."""
VERBS = (
    "expected|download|use|give|choose|update|put|save|load|allow|wait|convert|report|take|get|close|free|restart|check"
)
CURE = re.compile(rf"(^|[.:;] |, (or|and) |, )({VERBS})\b", re.I)
"""Of a cure: a sentence that begins with what to do or with what was expected."""
ABOUT_ALL = "tensors that do not fit"
"""Of a finding that no one tensor is to blame for."""
EVENTS = re.compile(
    r"subprocess\.|os\.(system|exec|fork|posix_spawn|spawn|startfile|remove|rename|mkdir|rmdir|chmod|link)"
)
MORE_EVENTS = re.compile(
    r"os\.(symlink|truncate|chown|utime|putenv)|socket\.|shutil\.|urllib\.|ftplib|smtplib|ctypes\.dlopen"
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Verdict:
    """fault: what is wrong, empty if all is well. read: whether it was read. megabytes: more than before.

    last: whether the process holds too much to read another.
    """

    fault: str = ""
    read: bool = False
    seconds: float = 0.0
    megabytes: float = 0.0
    said: str = ""
    last: bool = False


@dataclass(frozen=True)
class Order:
    """name: of the format. target: what is read; mapped: whether by mapping it. folder: that of the case.

    file, key: the one place that was changed, where it has a name; an error about that file must have it.
    """

    name: str
    target: str
    mapped: bool
    folder: str
    file: str = ""
    key: str = ""


def run_case(reader: Reader, name: str, seed_folder: Path, scratch: Path, key: str) -> tuple[Verdict, str]:
    """(what came of a case, how its files were changed). name: of a format of the reader; key: draws the changes."""
    rng, form = random.Random(key), reader.formats[name]
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    copied(seed_folder, folder)
    changes: list[str] = []
    keys: list[tuple[str, str] | None] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            how, key = mutate(folder, rng)
            changes.append(how)
            keys.append(key)
        except Exception:  # what the change before left is beyond this one
            keys.append(None)
            changes.append(f"none ({traceback.format_exc(-1).splitlines()[-1]})"[:200])
    target = folder / form.target if form.target else folder
    moving = rng.random() < 0.05
    touched = keys[0] if len(keys) == 1 and not moving else None
    order = Order(name, str(target), not moving and rng.random() < 0.8, str(folder), *(touched or ("", "")))
    if moving:
        changes.append("while it is read")
        reader.end()
        # torch maps what it opens: there a process may end where a file is cut off instead of replaced
        with _moved(folder, rng, in_place=not form.target.endswith(".pt")):
            verdict = reader.read(order)
        reader.end()
        return verdict, ", ".join(changes)
    before = _listed(folder)
    others, verdict = reader.cases, reader.read(order)
    if verdict.fault and others:
        alone = reader.read(order)
        verdict = alone if alone.fault else replace(verdict, fault=f"after {others} others: {verdict.fault}")
    if not verdict.fault and _listed(folder) != before:
        verdict.fault = "files were written"
    return verdict, ", ".join(changes)


@contextlib.contextmanager
def _moved(folder: Path, rng: random.Random, in_place: bool) -> Iterator[None]:
    """Inside, another process changes the files of a folder."""
    mover = os.fork()
    if not mover:
        try:
            _move(folder, rng, in_place)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(mover, signal.SIGKILL)
        os.waitpid(mover, 0)


def _move(folder: Path, rng: random.Random, in_place: bool) -> None:
    """Puts others in the place of files, and cuts these off and writes into them if `in_place`, until it is ended."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 64 << 20]
    raw = {path: path.read_bytes() for path in files}
    while files:
        path = rng.choice(files)
        size = len(raw[path])
        kind = rng.randrange(3) if in_place else 2
        if kind == 0:
            os.truncate(path, rng.randrange(size + 1))
        elif kind == 1:
            path.write_bytes(raw[path])
        else:
            path.with_name("new").write_bytes(raw[path][: rng.choice((size, size // 2))])
            path.with_name("new").replace(path)
        time.sleep(0.002)


def _listed(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


class Reader:
    """Has cases read in a process that this one forks: another for each fault, and after CASES of them.

    A fork copies the tables of all pages, which takes longer than most cases. formats: what it may be asked for, by
    name; cases: how many its process has read.
    """

    def __init__(self, formats: Mapping[str, Format]) -> None:
        self.formats, self.cases, self._child = formats, 0, 0

    def read(self, order: Order) -> Verdict:
        """What the reader of the format makes of the files, as they are."""
        if not self._child:
            self._begin()
        os.write(self._orders, f"{json.dumps(astuple(order))}\n".encode())
        raw, until = b"", time.monotonic() + WALL_SECONDS
        while not raw.endswith(b"\n") and select.select([self._told], [], [], max(0.0, until - time.monotonic()))[0]:
            if not (piece := os.read(self._told, 1 << 16)):
                break
            raw += piece
        self.cases += 1
        if raw.endswith(b"\n"):
            verdict = Verdict(**json.loads(raw))
            if verdict.fault or verdict.last or self.cases == CASES:
                self.end()
            return verdict
        hung = time.monotonic() >= until
        status = self.end()
        return Verdict(f"hung for {WALL_SECONDS:.0f} s" if hung else f"ended by signal {os.WTERMSIG(status)}")

    def end(self) -> int:
        """Ends the process, if there is one; returns what waitpid says of it. The next case gets another."""
        if not self._child:
            return 0
        for pipe in (self._orders, self._told):
            os.close(pipe)
        os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        self.cases, self._child = 0, 0
        return status

    def _begin(self) -> None:
        orders, self._orders = os.pipe()
        self._told, into = os.pipe()
        self._child = os.fork()
        if not self._child:
            os.close(self._orders)
            os.close(self._told)
            _serve(self.formats, orders, into)
        os.close(orders)
        os.close(into)


def _serve(formats: Mapping[str, Format], orders: int, into: int) -> NoReturn:
    """The child: limits, watch, and a line of JSON for each order."""
    try:
        gc.freeze()
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        started = _held()
        room = started[0] + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        seen: list[str] = []
        sys.addaudithook(lambda event, arguments: _watch(seen, event, arguments))
        with os.fdopen(orders) as lines:
            for line in lines:
                verdict = _judged(formats, Order(*json.loads(line)), seen)
                gc.collect()
                verdict.last = any(now - then > KEPT for now, then in zip(_held(), started, strict=True))
                os.write(into, json.dumps(asdict(verdict)).encode() + b"\n")
    finally:
        os._exit(0)


def _judged(formats: Mapping[str, Format], order: Order, seen: list[str]) -> Verdict:
    verdict, folder = Verdict(), Path(order.folder)
    Path("/proc/self/clear_refs").write_text("5")  # the most that was held begins anew
    seen.clear()
    memory, started = _peak(), time.process_time()
    try:
        formats[order.name].read(Path(order.target), order.mapped)
        verdict.read = True
    except PackError as error:
        verdict.said = str(error)
        verdict.fault = _wrong_message(error, folder) or _without_key(error, order)
    except BaseException as error:
        verdict.said = f"{type(error).__name__}: {error}"[:2000]
        verdict.fault = "another exception\n" + "".join(traceback.format_exception(error))[-3000:]
    acts = list(seen)
    verdict.seconds, verdict.megabytes = time.process_time() - started, (_peak() - memory) / 1e6
    if not verdict.fault:
        verdict.fault = _excess(verdict, acts)
    return verdict


def _held() -> tuple[int, int]:
    """Bytes of addresses and of memory."""
    size, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
    return size * resource.getpagesize(), resident * resource.getpagesize()


def _watch(seen: list[str], event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES and path not in (os.devnull,):
            seen.append(f"open {path!r} to write")
    elif event == "ctypes.dlopen" and arguments == (None,):
        pass  # the functions of this process itself: no file is loaded
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


def _without_key(error: PackError, order: Order) -> str:
    """What an error lacks that is about a file of which one thing was changed: the name of that, or of its layer.

    Nothing where it is about all tensors: of two that do not fit each other, nobody knows the right one.
    """
    if not order.key or str(error.path) != order.file or ABOUT_ALL in error.found:
        return ""
    told = f"{error.key} {error.found} {error.cure}"
    key = order.key.removeprefix("diffusion_model.")  # by which ComfyUI knows it
    layer = key.rpartition(".")[0] or key
    return "" if shown(layer, 60).partition(GAP)[0] in told else f"a message without the key {order.key}"


def _wrong_message(error: PackError, folder: Path) -> str:
    """What a message lacks: one printable line of the name of a file of the case, what to do, and its path."""
    text = str(error)
    said, _, end = text.rpartition(f" ({folder}")
    if not end.endswith(")") or not said.startswith(f"{Path(f'{folder}{end[:-1]}').name}: "):
        return "a message that names no file"
    if not text.isprintable() or len(text) > LONGEST + 300:
        return "a message that is no line"
    if not said.endswith(".") or not CURE.search(error.cure):
        return "a message without a cure"
    return ""
