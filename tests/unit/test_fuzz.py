"""A bounded set of the fuzzer's cases; all of it: python -m tests.fuzz --cases 50000."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import TextIO

import pytest
from fuzz.formats import FORMATS
from fuzz.run import begin, collect

from bonsai_ops.tools.environment import PLUGIN, clean_environment

CASES = 1450
SEED = "suite"
"""The same cases every day, so that a change alone can make the suite fail; the command tries others."""
SECONDS = 600

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")


def fuzz(*arguments: str, comfyui: Path) -> subprocess.CompletedProcess[str]:
    """The command within this Python."""
    variables = {"BONSAI_FUZZ": "1", "OMP_NUM_THREADS": "1", "BONSAI_COMFYUI": str(comfyui)}
    line = [sys.executable, "-m", "tests.fuzz", *arguments]
    environment = clean_environment(variables)
    return subprocess.run(
        line, cwd=PLUGIN, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_every_reader(comfyui_path: Path) -> None:
    done = fuzz("--cases", str(CASES), "--seed", SEED, "--workers", "2", comfyui=comfyui_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    cases = {row[1].strip(): tuple(map(int, row[2:5])) for row in table}
    assert set(cases) == set(FORMATS) and sum(number for number, *_ in cases.values()) >= CASES
    assert all(number > 20 for number, *_ in cases.values())
    assert sum(read for _, read, _ in cases.values()) > CASES // 50 and all(refused for *_, refused in cases.values())


def test_ctrl_c_ends_what_hears_nothing_and_tells_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of cases are reported when they are stopped, and lines of two workers at once are all read.

    A worker that Ctrl-C meets in the midst of a fork goes on: it was waited for until its last case. Its reader ends
    with it, and half a line is none.
    """
    alive, kept = os.pipe()

    def work(worker: int, lines: TextIO) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.fork():
            lines.write(f"[{worker}, 0]\n[{worker}, 1]\n[{worker}")
            lines.flush()
            os.write(kept, b"told")
        time.sleep(20)

    pipes = [begin(functools.partial(work, worker)) for worker in range(2)]
    os.close(kept)
    for _ in pipes:
        assert os.read(alive, 4) == b"told"
    looks, wait = iter(range(1000)), select.select

    def interrupted(*what: list) -> tuple[list, ...]:
        if next(looks) == 1:
            raise KeyboardInterrupt
        return wait(*what)

    monkeypatch.setattr(select, "select", interrupted)
    found: list[list[int]] = []
    started = time.monotonic()
    assert collect(pipes, found) == "stopped"
    assert sorted(found) == [[worker, case] for worker in range(2) for case in range(2)]
    with open(alive, "rb") as everyone:
        assert everyone.read() == b"" and time.monotonic() - started < 10


def test_changing_a_file_ends(tmp_path: Path) -> None:
    """Files are changed more than once, outside the limits of a case: torch would hash this key 2^40 times."""
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a/data.pkl", b"\x80\x02})" + b"q\0h\0\x86" * 40 + b"Ns.")
        opened.writestr("a/version", b"3")
    before = path.read_bytes()
    code = "import sys, random, pathlib; from tests.fuzz.torch_files import values; "
    code += "values(pathlib.Path(sys.argv[1]), random.Random(0))"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=PLUGIN, timeout=60, check=True)
    assert path.read_bytes() == before


def test_what_a_reader_must_not_do_is_seen(tmp_path: Path) -> None:
    """A reader that hangs, takes memory, writes, runs, connects, raises or says too little is a failed case.

    So is one that fails after others only; what holds memory leaves none less for the next.
    """
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    line = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(
        line,
        cwd=PLUGIN,
        env={**os.environ, "PYTHONPATH": str(PLUGIN), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = """
import os, socket, subprocess, sys, time
from pathlib import Path
import torch
from bonsai_ops.weights.errors import PackError
from tests.fuzz import case
from tests.fuzz.formats import Format

def spin(path, mapped):
    until = time.process_time() + 1.2
    while time.process_time() < until:
        pass

def fail(text):
    def read(path, mapped):
        raise PackError(path, *text)
    return read

def other(path, mapped):
    raise KeyError("a")

READERS = {
    "": lambda path, mapped: None,
    "hung": lambda path, mapped: time.sleep(30),
    "took 1.": spin,
    "MB": lambda path, mapped: torch.ones(200_000_000),
    "another exception": lambda path, mapped: torch.ones(1 << 40),
    "another exception\\nTraceback": other,
    "did more than read: open": lambda path, mapped: open(path.with_name("new"), "w"),
    "did more than read: socket": lambda path, mapped: socket.socket().connect_ex(("127.0.0.1", 9)),
    "ended by signal 11": lambda path, mapped: os.kill(os.getpid(), 11),
    "without a cure": fail(("is bad", "It is bad.")),
    "a message without a cure": fail(("is bad", "It is of no use to load it.")),
    "no file": lambda path, mapped: fail(("is bad", "Use another."))(Path("a"), mapped),
}
case.WALL_SECONDS, case.SECONDS = 15, 1.0
scratch = Path(sys.argv[1])
seed = scratch / "seed"
seed.mkdir()
(seed / "w.bin").write_bytes(bytes(100))
for expected, read in READERS.items():
    verdict, _ = case.run_case(case.Reader({"a": Format(lambda folder: None, "w.bin", read)}), "a", seed, scratch, "0")
    assert (expected in verdict.fault) if expected else not verdict.fault, (expected, verdict)

changed = case.Order("a", "", True, "", "w.bin", "a.0.qkv.weight")
for error, lacks in {
    PackError("w.bin", "is bad", "Use another."): True,
    PackError("w.bin", "is bad", "Use another.", "a.1.qkv.weight"): True,
    PackError("w.bin", "is bad", "Use another.", "a.0.qkv.scales"): False,
    PackError("w.bin", "is bad like a.0.qkv", "Use another."): False,
    PackError("other.bin", "is bad", "Use another."): False,
}.items():
    assert bool(case._without_key(error, changed)) == lacks, error

kept = []

def again(path, mapped):
    kept.append(path)
    if len(kept) > 1:
        raise KeyError("a")

reader = case.Reader({"a": Format(lambda folder: None, "w.bin", again)})
found = [case.run_case(reader, "a", seed, scratch, str(number))[0].fault for number in range(3)]
assert [fault.partition("\\n")[0] for fault in found] == ["", *["after 1 others: another exception"] * 2], found

reader = case.Reader({"a": Format(lambda folder: None, "w.bin", lambda *_: kept.append(torch.ones(30_000_000)))})
for number in range(2):
    assert not case.run_case(reader, "a", seed, scratch, str(number))[0].fault and not reader.cases
"""
