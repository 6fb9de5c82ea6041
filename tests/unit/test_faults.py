"""Faults of the machine while a file is read or made: no memory, no handles, no room, an end without warning."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from messages import reason
from small_disk import KINDS, OTHERS, small_disk

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import PLUGIN as REPOSITORY
from bonsai_ops.weights import files, flux2
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.new_file import MAKE_ROOM, MB
from bonsai_ops.weights.packed_weight import PackedWeight

resource = pytest.importorskip("resource")

LARGE = flux2.Geometry(hidden=512, context=384, in_channels=128, double_blocks=1, single_blocks=2)
"""About 14 MB packed: more than the memory that a process has lying about."""


FILES: dict[str, Callable[[Path], None]] = {
    "model.safetensors": lambda path: synthetic.write_mlx(path, "ternary", LARGE),
    "state_dict.pt": lambda path: synthetic.write_gemlite(path, "ternary", LARGE),
}


@pytest.fixture(scope="module", params=FILES)
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / request.param
    FILES[request.param](path)
    return path


def values(path: Path) -> dict[str, torch.Tensor]:
    weights = {name: entry.weight() for name, entry in open_pack(path).entries.items()}
    return {name: w.codes if isinstance(w, PackedWeight) else w for name, w in weights.items()}


@pytest.fixture
def limited() -> Iterator[Callable[[int, int], None]]:
    """A function that lowers a limit of this process, until the test ends."""
    kept: dict[int, tuple[int, int]] = {}

    def lower(kind: int, most: int) -> None:
        kept.setdefault(kind, resource.getrlimit(kind))
        resource.setrlimit(kind, (most, kept[kind][1]))

    yield lower
    for kind, limits in kept.items():
        resource.setrlimit(kind, limits)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what a process has")
def test_no_memory_is_no_damage(pack: Path, limited: Callable[[int, int], None]) -> None:
    """It was told as a damaged download."""
    expected = values(pack)
    gc.collect()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limited(resource.RLIMIT_AS, held + (4 << 20))
    try:
        with pytest.raises(PackError) as found:
            open_pack(pack)
    finally:
        limited(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    assert reason(found.value, pack).startswith("cannot be read (Cannot allocate memory). Close other programs")
    again = values(pack)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def handles_of(path: Path) -> list[str]:
    """The open ones of this file; others come and go with what earlier tests left running."""
    found = []
    for handle in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            found += [handle] if os.path.samestat(os.fstat(int(handle)), path.stat()) else []
    return found


def test_no_handles_are_no_damage(pack: Path, limited: Callable[[int, int], None]) -> None:
    """Whichever of the files that are opened for it is the first without one; none stays open."""
    values(pack)
    kept = handles_of(pack)  # torch keeps the one of a mapping for which there was no memory
    said, lowest = [], os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    for more in range(8):
        limited(resource.RLIMIT_NOFILE, lowest + more)
        try:
            open_pack(pack)
        except PackError as error:
            said.append(reason(error, pack))
        else:
            break
        finally:
            limited(resource.RLIMIT_NOFILE, lowest + 100)
    assert said and set(said) == {
        f"cannot be read (Too many open files). {files.MACHINES[errno.EMFILE]}",
    }
    gc.collect()
    assert handles_of(pack) == kept
    with pack.open("rb"):
        assert len(handles_of(pack)) == len(kept) + 1


def converted(*arguments: str, script: str | None = None, **options: object) -> subprocess.Popen[str]:
    code = script or "import sys; from bonsai_ops import convert; raise SystemExit(convert.main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=REPOSITORY, text=True, **pipes, **options)


SLOW = """
import sys, time
from bonsai_ops import convert
from bonsai_ops.weights.formats import native
seconds = float(sys.argv.pop(1))
native.os.fsync = lambda handle: time.sleep(seconds)
raise SystemExit(convert.main(sys.argv[1:]))
"""
"""Takes so many seconds between the last byte and the name."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "diffusion_pytorch_model.safetensors"
    synthetic.write_mlx(path, "ternary", synthetic.TINY)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_room_for_a_conversion(kind: str, source: str, tmp_path: Path) -> None:
    """On a small disk it is told before anything is written, of a quota at its end; nothing is left there."""
    with small_disk(tmp_path / "disk", 200_000, kind) as limit:
        target = tmp_path / "disk" / "w.safetensors"
        run = converted(source, str(target), preexec_fn=limit)
        _, said = run.communicate(timeout=120)
        assert run.returncode == 1, said
        told = reason(said.strip(), target)
        assert told.startswith("needs ") and told.endswith("or choose another folder.")
        assert "MB" in told and len(told.splitlines()) == 1 and list(target.parent.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_on_a_small_disk_is_no_skip(kind: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), small_disk(tmp_path / "disk", 4096, kind):
        raise OSError("full")


FILLED = """
import sys
from pathlib import Path
from small_disk import OTHERS, fill
from bonsai_ops import convert
from bonsai_ops.weights.new_file import PREFIX
folder, bar = Path(sys.argv[-1]).parent, convert._bar

def report(stage):
    def told(done, total):
        if stage == "writing" and not (folder / OTHERS).exists():
            fill(folder)
            (hidden,) = folder.glob(f"{PREFIX}*")
            print(done, total, hidden.stat().st_size)
    return told

convert._bar = report
raise SystemExit(convert.main(sys.argv[1:]))
"""
"""Another program takes the rest of the disk after the first bytes were written."""


def test_a_disk_that_is_full_while_a_conversion_writes(source: str, tmp_path: Path) -> None:
    """There was room when it began. What it wrote is gone; elsewhere, and with room, the next run succeeds."""
    path = {"env": {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}}
    with small_disk(tmp_path / "disk", 16 << 20, "disk"):
        target, other = tmp_path / "disk" / "w.safetensors", tmp_path / "w.safetensors"
        run = converted(source, str(target), script=FILLED, **path)
        written, said = run.communicate(timeout=120)
        assert run.returncode == 1, said
        done, total, on_disk = map(int, written.split())
        assert 0 < done < total and on_disk > 0
        (left,) = target.parent.iterdir()
        assert left.name == OTHERS
        assert converted(source, str(other)).wait(120) == 0
        told = f"needs {other.stat().st_size / MB:,.1f} MB, and there is no room for it (No space left on device)."
        assert reason(said.strip(), target) == f"{told} {MAKE_ROOM}" and len(said.strip().splitlines()) == 1
        left.unlink()
        assert converted(source, str(target)).wait(120) == 0 and target.read_bytes() == other.read_bytes()


def test_two_conversions_to_one_target_and_one_that_is_killed(source: str, tmp_path: Path) -> None:
    """One gets it and the other says so; what the killed one left is no model, and is taken away by a later run."""
    from bonsai_ops.weights.release import find_transformer

    target = tmp_path / "w.safetensors"
    runs = [converted("1.5", source, str(target), script=SLOW) for _ in range(2)]
    killed = converted("60", source, str(tmp_path / "k.safetensors"), script=SLOW)
    until = time.monotonic() + 120
    while not (len(list(tmp_path.glob(".*.part"))) == 1 and target.exists()):
        assert time.monotonic() < until
        time.sleep(0.05)
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], said
    assert sum("exists" in text and "hoose another name" in text for text in said) == 1
    expected = target.read_bytes()

    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (left,) = tmp_path.glob(".*.part")
    assert left.stat().st_size == len(expected) and not (tmp_path / "k.safetensors").exists()
    assert find_transformer(tmp_path) == target
    old = time.time() - 3600
    os.utime(left, (old, old))
    again = converted(source, str(tmp_path / "k.safetensors"))
    assert again.wait(120) == 0 and again.communicate() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.safetensors", "w.safetensors"]
    assert (tmp_path / "k.safetensors").read_bytes() == expected
