"""ComfyServer without ComfyUI: options, messages and the end of a process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from bonsai_ops.tools import server
from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.tools.server import ComfyServer, PromptInterruptedError

FAKE = """
import http.server, json, sys

HISTORY = {"good": {"outputs": {"9": {"images": [{"filename": "a.png", "subfolder": "s", "type": "output"}]}},
                    "status": {"status_str": "success", "messages": []}},
           "bad": {"outputs": {}, "status": {"status_str": "error", "messages": [["execution_error", {
                   "node_id": "3", "node_type": "Sampler", "exception_type": "ValueError",
                   "exception_message": "too small", "traceback": []}]]}}}
INVALID = {"error": {"message": "Prompt outputs failed validation", "details": ""}, "node_errors": {
           "5": {"class_type": "Load", "errors": [{"message": "Value not in list", "details": "name: 'x'"}]}}}


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        if self.path == "/queue":
            print(" 50%|#####     | 2/4 [00:01<00:01]")
            self.answer(200, {"queue_pending": []})
        else:
            key = self.path.rpartition("/")[2]
            self.answer(200, {key: HISTORY[key]} if key in HISTORY else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(400, INVALID) if "invalid" in body["prompt"] else self.answer(200, {"prompt_id": "good"})


if "--words" in sys.argv:
    import words
    sys.exit(words.TEXT)
if "--fail" in sys.argv:
    print("no such model folder")
    sys.exit(3)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder that looks like ComfyUI to ComfyServer, with a main.py that answers from a table."""
    folder = tmp_path / "comfyui"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text(FAKE)
    (folder / "comfy" / "cli_args.py").write_text('parser.add_argument("--database-url")\n')
    return folder


def make(comfyui: Path, *extra: str, port: int = 0) -> ComfyServer:
    return ComfyServer(Path(sys.executable), comfyui, comfyui.parent / "base", port=port, extra_args=extra)


def test_unknown_options_are_left_out(comfyui: Path) -> None:
    command = make(comfyui, "--fast").command()
    assert "--cpu" in command
    assert "--disable-api-nodes" not in command
    assert command[command.index("--database-url") + 1].endswith("base/user/comfyui.db")
    assert command[-1] == "--fast"


def test_queue_wait_and_images(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with make(comfyui) as running:
        entry = running.wait(running.queue({"1": {}}), timeout=30)
        assert running.images(entry) == [running.base_directory / "output" / "s" / "a.png"]
        with pytest.raises(RuntimeError, match=r"(?s)failed validation.*node 5 \(Load\): Value not in list: name: 'x'"):
            running.queue({"invalid": {}})
        with pytest.raises(RuntimeError, match=r"Node 3 \(Sampler\) failed with ValueError: too small"):
            running.wait("bad", timeout=30)
        states: list[str] = []
        with pytest.raises(RuntimeError, match="did not end within 2 s"):
            running.wait("unknown", timeout=1.5, on_progress=lambda seconds, state: states.append(state))
        assert states[-1] == "step 2 of 4"
    with pytest.raises(RuntimeError, match="not running"):
        running.wait("good")


def test_end_of_the_process_shows_its_last_words(comfyui: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)code 3.*no such model folder"):
        make(comfyui, "--fail").start()


@pytest.mark.parametrize("place", ["absolute", "relative"])
def test_packages_come_first(comfyui: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.chdir(comfyui.parent)
    folder = comfyui.parent / "packages"
    folder.mkdir()
    (folder / "words.py").write_text('TEXT = "said by a package"\n')
    packages = folder if place == "absolute" else Path("packages")
    running = ComfyServer(
        Path(sys.executable), comfyui, comfyui.parent / "base", extra_args=["--words"], packages=packages
    )
    with pytest.raises(RuntimeError, match="said by a package"):
        running.start()


STAYS = """
import sys, time
from pathlib import Path
from bonsai_ops.tools.server import ComfyServer

comfyui = Path(sys.argv[1])
with ComfyServer(Path(sys.executable), comfyui, comfyui.parent / "base") as running:
    print(running.url, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_a_program_that_is_ended_ends_its_server(comfyui: Path) -> None:
    command = [sys.executable, "-c", STAYS, str(comfyui)]
    with subprocess.Popen(command, cwd=PLUGIN, stdout=subprocess.PIPE, text=True) as program:
        url = program.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/queue", timeout=30) as answer:
            assert answer.status == 200
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/queue", timeout=30)


def test_port_in_use_is_refused(comfyui: Path) -> None:
    with socket.socket() as other:
        other.bind((server.HOST, 0))
        other.listen()
        with pytest.raises(RuntimeError, match="in use by another program"):
            make(comfyui, port=other.getsockname()[1]).start()


def test_interruption_is_its_own_error() -> None:
    messages = [["execution_interrupted", {"node_id": "3", "node_type": "Sampler"}]]
    with pytest.raises(PromptInterruptedError, match="node 3"):
        server.check_entry({"status": {"status_str": "error", "messages": messages}})
