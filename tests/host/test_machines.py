"""The examples for several machines: with real Ray, over two real servers, and a model that travels to a process."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from twins import draw, write_pack

from bonsai_ops.demo import WORKFLOW
from bonsai_ops.tools.environment import link_plugin
from bonsai_ops.tools.environment.processes import inherited_environment
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import find_nodes, to_api
from machines import over_distributed
from machines.over_ray import PLUGIN, PROMPTS, SEEDLING, Painter, Place, tasks

pytestmark = [pytest.mark.host, pytest.mark.processor, pytest.mark.slow]

PIXELS, PICTURES = (64, 64), 4
CHILD = """
import hashlib, pickle, sys
from pathlib import Path
sys.path += sys.argv[2:]
from bonsai_ops.tools.bench.inside import comfyui
comfyui.set_up(Path(sys.argv[1]), "cpu")
function, arguments = pickle.loads(sys.stdin.buffer.read())
import torch
torch.set_num_threads(1)
from twins import draw
print("drew", hashlib.sha256(draw(function(*arguments)).numpy().tobytes()).hexdigest())
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the actors have, of one processor each: the bits of a product depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_model_travels_as_function_and_path(comfyui_path: Path, tmp_path: Path) -> None:
    """What raylight and its like call: a function of a module, which a worker imports, with a path and plain options.

    It takes a second process with a ComfyUI of its own.
    """
    from bonsai_ops.host.loader import load_bonsai_model

    path = write_pack(tmp_path / "model.safetensors", "ternary")
    wanted = (load_bonsai_model, (str(path), {"compute_dtype": "fp32"}))
    sent = pickle.dumps(wanted)
    assert b"bonsai_ops.host.loader" in sent and len(sent) < 1000
    command = [sys.executable, "-c", CHILD, str(comfyui_path), str(PLUGIN), str(PLUGIN / "tests")]
    done = subprocess.run(command, input=sent, env=inherited_environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    here = hashlib.sha256(draw(load_bonsai_model(*wanted[1])).numpy().tobytes()).hexdigest()
    assert done.stdout.decode().split("drew ")[1].strip() == here


@pytest.fixture
def rays_folder() -> Iterator[Path]:
    """Short: a socket's name has 107 characters at most."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_ray_spreads_prompts_over_actors(comfyui_path: Path, rays_folder: Path, tmp_path: Path) -> None:
    """One and two actors, and one that is ended while it draws: all pictures are there and those of one machine.

    It takes three processes with a ComfyUI each.
    """
    variables = {"RAY_TMPDIR": str(rays_folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "machines.over_ray", "--comfyui", str(comfyui_path), "--actors", "1", "2"]
    command += ["--pictures", str(PICTURES), "--size", *map(str, PIXELS), "--kill", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=PLUGIN,
        env={**inherited_environment(), **variables},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    # What Ray says of the process that was ended may stand between.
    loaded, one, two, replaced, same = [line for line in done.stdout.splitlines() if "raylet" not in line]
    assert loaded.startswith("2 actors loaded in ")
    assert one.startswith(f"1 of the actors: {PICTURES} pictures in ") and "again" not in one
    assert two.startswith(f"2 of the actors: {PICTURES} pictures in ") and two.endswith(", 1 given again.")
    assert replaced.endswith("was ended while it drew; a new one took its place.")
    assert same == "The same seeds gave the same pictures, to the bit, in every run."
    from bonsai_ops.host.pack import load_pack

    painter = Painter(Place(str(comfyui_path), str(PLUGIN)))
    painter.parts = load_pack(PLUGIN / SEEDLING)
    for task in tasks(PROMPTS, PICTURES, 0, PIXELS):
        assert (tmp_path / f"{task.number:04}.png").read_bytes() == painter.draw(task)
    assert not Path("/proc").is_dir() or not still_running(rays_folder)


def still_running(folder: Path) -> list[str]:
    """Processes whose command names a folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return [line for line in lines if os.fspath(folder) in line]


# ComfyUI-Distributed


def alone(prompt: dict[str, dict], number: int) -> dict[str, dict]:
    """The graph as the plugin's two nodes have server `number` draw it, without them: plain servers lack them."""
    seeds = {
        n: node["inputs"]["seed"] + number for n, node in prompt.items() if node["class_type"] == "DistributedSeed"
    }
    links = {n: node["inputs"]["images"] for n, node in prompt.items() if node["class_type"] == "DistributedCollector"}
    made = {}
    for n in prompt.keys() - seeds.keys() - links.keys():
        inputs = {k: v[0] if isinstance(v, list) else v for k, v in prompt[n]["inputs"].items()}
        inputs = {k: seeds.get(v, links.get(v, prompt[n]["inputs"][k])) for k, v in inputs.items()}
        made[n] = {**prompt[n], "inputs": inputs}
    return made


class Distributed(ThreadingHTTPServer):
    """Stands in for ComfyUI-Distributed 1.4.4 before real servers: its two routes that the example asks, and /history.

    Workers that do not answer are left out; pictures of those that did go to the first server. kills: the first worker
    is ended once it has its graph.
    """

    def __init__(self, *servers: ComfyServer) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.servers, self.kills = servers, False
        self.queued: list[tuple[ComfyServer, str]] = []

    def queue(self, body: dict[str, Any]) -> dict[str, Any]:
        first, *workers = self.servers
        chosen = [first]
        for number, worker in enumerate(workers, 1):
            with contextlib.suppress(OSError):
                if str(number) in body["enabled_worker_ids"]:
                    worker.get("/queue")
                    chosen.append(worker)
        self.queued = [(server, server.queue(alone(body["prompt"], i))) for i, server in enumerate(chosen)]
        if self.kills:
            os.kill(workers[0].pid, signal.SIGKILL)
        return {"prompt_id": self.queued[0][1], "worker_count": len(chosen) - 1}

    def history(self) -> dict[str, Any]:
        found = []
        for server, prompt in self.queued:
            with contextlib.suppress(OSError):
                if not (entry := server.get(f"/history/{prompt}")):
                    return {}
                found.append((server, entry[prompt]))
        (first, entry), *others = found
        for number, (server, other) in enumerate(others, 1):
            (picture,) = server.images(other)
            name = f"worker-{number}-{picture.name}"
            shutil.copyfile(picture, first.base_directory / "output" / name)
            entry["outputs"][f"worker {number}"] = {"images": [{"filename": name, "type": "output"}]}
        return {self.queued[0][1]: entry}


class Routes(BaseHTTPRequestHandler):
    server: Distributed

    def do_GET(self) -> None:
        workers = [{"id": str(n), "enabled": True} for n in range(1, len(self.server.servers))]
        self.answer({"workers": workers} if self.path == "/distributed/config" else self.server.history())

    def do_POST(self) -> None:
        assert self.path == "/distributed/queue"
        self.answer(self.server.queue(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def answer(self, said: dict[str, Any]) -> None:
        raw = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


def test_two_servers_and_one_that_is_killed(
    comfyui_path: Path,
    comfy_server: Callable[..., ComfyServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each draws its seed. What a killed worker had is told as missing, and drawn by who is left when asked again."""
    first, graph_file = comfy_server(), tmp_path / "graph.json"
    link_plugin(tmp_path / "worker")
    graph = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), first.object_info())
    (sampler,), (saving,) = (find_nodes(graph, kind) for kind in ("BonsaiSampler", "SaveImage"))
    graph[saving]["inputs"]["filename_prefix"] = "machines"

    def drawn(seed: int, *options: str) -> tuple[int, list[bytes], str]:
        """(exit code, pixels of the pictures, what was said)."""
        graph[sampler]["inputs"]["seed"] = seed
        graph_file.write_text(json.dumps(graph), encoding="utf-8")
        code = over_distributed.main([str(graph_file), "--server", address, *options])
        said = capsys.readouterr()
        told, *names = said.out.splitlines()
        pictures = [Image.open(first.base_directory / "output" / name).tobytes() for name in names]
        return code, pictures, told + said.err

    with (
        ComfyServer(Path(sys.executable), comfyui_path, tmp_path / "worker", packages=first.packages) as worker,
        Distributed(first, worker) as distributed,
    ):
        threading.Thread(target=distributed.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{distributed.server_port}"
        code, (one, two), said = drawn(5)
        assert code == 0 and one != two and said == "1 of 1 workers answer."
        distributed.kills = True
        code, pictures, said = drawn(5)
        assert code == 1 and pictures == [one] and said.startswith("1 of 1 workers answer.1 pictures are missing")
        distributed.kills = False
        code, pictures, said = drawn(6)
        assert code == 1 and pictures == [two] and said.startswith("0 of 1 workers answer.1 pictures are missing")
        assert drawn(6, "--workers") == (0, [two], "0 of 0 workers answer.")
        distributed.shutdown()
