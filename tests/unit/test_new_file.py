"""A file that is complete or absent: two that write it, a process that is killed, a disk that is full, long names."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bonsai_ops.tools.environment import PLUGIN as REPOSITORY
from bonsai_ops.tools.synthetic import TINY, write_mlx
from bonsai_ops.weights import new_file as module
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import native
from bonsai_ops.weights.new_file import new_file

WEIGHTS = {"a.weight": torch.arange(8.0)}
POSIX = pytest.mark.skipif(os.name == "nt", reason="processes of Windows cannot be asked to end")


def write(path: Path, weights: dict[str, torch.Tensor] = WEIGHTS, **options: object) -> None:
    native.write(path, weights, native.make_record({}), **options)


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a file system that knows links; FAT is one that does not."""

    def none(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", none)


def save(number: int, path: Path, together: threading.Barrier, said: dict[int, str]) -> None:
    try:
        write(path, {"a.weight": torch.full((8,), float(number))}, check=lambda pack: together.wait(30))
        said[number] = "done"
    except PackError as error:
        said[number] = str(error)


@pytest.mark.usefixtures("links")
def test_of_many_that_write_one_path_one_gets_it(tmp_path: Path) -> None:
    for turn in range(20):
        path, together, said = tmp_path / f"{turn}.safetensors", threading.Barrier(8), {}
        threads = [threading.Thread(target=save, args=(number, path, together, said)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [number for number, text in said.items() if text == "done"]
        assert sum("It appeared while this file was written" in text for text in said.values()) == 7
        weights = native.read(native.FILE(path)).entries["a.weight"].weight()
        assert torch.equal(weights, torch.full((8,), float(winner)))
    assert held(tmp_path) == sorted(f"{turn}.safetensors" for turn in range(20))


@pytest.mark.usefixtures("links")
def test_a_path_that_is_a_link_to_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    try:
        path.symlink_to(tmp_path / "gone")
    except OSError:
        pytest.skip("this system does not allow symbolic links")
    with pytest.raises(PackError, match="exists"):
        write(path)
    assert held(tmp_path) == ["w.safetensors"] and path.is_symlink()
    write(path, overwrite=True)
    assert not path.is_symlink() and not (tmp_path / "gone").exists()


def test_a_name_of_all_the_letters_that_there_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 243 + ".safetensors")
    write(path)
    write(path, overwrite=True)
    assert held(tmp_path) == [path.name]
    with pytest.raises(PackError, match=r"cannot be written \(.*name.*\)\. Choose another name"):
        write(tmp_path / ("a" * 244 + ".safetensors"))
    with pytest.raises(PackError, match="cannot be written"):
        write(path / "w.safetensors")
    assert held(tmp_path) == [path.name]


def test_room_is_looked_for_first(tmp_path: Path) -> None:
    with (
        pytest.raises(PackError, match=r"w: needs 1,152,921,504,606\.8 MB, and [\d,.]+ MB are left for it\. Free some"),
        new_file(tmp_path / "w", 1 << 60),
    ):
        pytest.fail("it was begun")
    assert held(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """Another writes to it too, or it is full for this user alone."""
    with (
        pytest.raises(PackError, match=r"w: needs 5\.0 MB, and there is no room for it \(No space left on device\)"),
        new_file(tmp_path / "w", 5_000_000) as (out, _),
    ):
        out.write(b"a")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert held(tmp_path) == []


@POSIX
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    was, modes = os.geteuid(), {f: f.stat().st_mode for f in tmp_path.parents if "pytest" in str(f)}
    (tmp_path / "a").mkdir(mode=0o555)
    for folder, mode in modes.items():
        folder.chmod(mode | 0o755)
    tmp_path.chmod(0o755)
    try:
        if was == 0:
            os.seteuid(65534)
        with pytest.raises(PackError, match=r"cannot be written \(Permission denied\)\. Choose another"):
            write(tmp_path / "a" / "w.safetensors")
    finally:
        os.seteuid(was)
        for folder, mode in modes.items():
            folder.chmod(mode)


KILLED = """
import os, signal, sys
from pathlib import Path
from bonsai_ops.weights.new_file import new_file
with new_file(Path(sys.argv[1]), 1) as (out, temporary):
    out.write(b"a" * 100000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@POSIX
def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=REPOSITORY, timeout=60, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and left.suffix == ".part"
    write(tmp_path / "a.safetensors")
    assert left.exists(), "it could be another machine's, which is writing it"
    old = time.time() - 2 * module.STALE_SECONDS
    os.utime(left, (old, old))
    write(tmp_path / "b.safetensors")
    assert held(tmp_path) == ["a.safetensors", "b.safetensors"]


@POSIX
def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """Also where it takes its time, and where it is closed already and read again."""
    for closed in (False, True):
        with new_file(tmp_path / f"slow{closed}", 1) as (out, temporary):
            out.write(b"a")
            if closed:
                out.close()
            else:
                out.flush()
            old = time.time() - 2 * module.STALE_SECONDS
            os.utime(temporary, (old, old))
            write(tmp_path / f"w{closed}.safetensors")
        assert (tmp_path / f"slow{closed}").read_bytes() == b"a"
    (tmp_path / ".bonsai-x.part").mkdir()
    os.utime(tmp_path / ".bonsai-x.part", (old, old))
    write(tmp_path / "w.safetensors")
    assert (tmp_path / ".bonsai-x.part").is_dir()


@POSIX
def test_an_end_while_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may come between the file and the lock on it."""

    def end(*arguments: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(module.fcntl, "flock", end)
    with pytest.raises(SystemExit):
        write(tmp_path / "w.safetensors")
    assert held(tmp_path) == []


CONVERTS = """
import os, signal, sys, threading, time
from pathlib import Path
from bonsai_ops import convert
from bonsai_ops.weights.formats import native
folder, number = Path(sys.argv[2]).parent, int(sys.argv[3])
signal.signal(number, signal.SIG_DFL)  # what nohup began ignores SIGHUP, and so do its children
def kill():
    while not any(p.suffix == ".part" for p in folder.iterdir()):
        time.sleep(0.001)
    os.kill(os.getpid(), number)
native.os.fsync = lambda handle: time.sleep(5)  # so that there is time to be killed in
threading.Thread(target=kill, daemon=True).start()
raise SystemExit(convert.main(sys.argv[1:3]))
"""


@POSIX
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_conversion_that_is_asked_to_end(tmp_path: Path, name: str) -> None:
    """A hidden file of 1.2 GB stayed for ever."""
    write_mlx(tmp_path / "pack" / "diffusion_pytorch_model.safetensors", "ternary", TINY)
    (tmp_path / "out").mkdir()
    number = getattr(signal, name)
    line = [sys.executable, "-c", CONVERTS, str(tmp_path / "pack"), str(tmp_path / "out" / "w.safetensors")]
    done = subprocess.run([*line, str(int(number))], cwd=REPOSITORY, timeout=60, check=False, capture_output=True)
    assert done.returncode == 128 + number, done.stderr
    assert held(tmp_path / "out") == [] and b"Traceback" not in done.stderr
