"""What travels: graphs in API format that a program queues, and old graphs, whose names must still be there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_files
from PIL import Image
from released import RELEASED

from bonsai_ops.tools.environment import NEWEST
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import to_api

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "scripting.md"
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
FIRST_RUN = WORKFLOWS[0]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def programs() -> list[str]:
    """The programs of the page: draw.py and one that imports it."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(comfy_server: Callable[..., ComfyServer]) -> Iterator[ComfyServer]:
    started = comfy_server(NEWEST)
    with tiny_files.written(started.base_directory):
        yield started


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    (folder / "draw.py").write_text(programs()[0], encoding="utf-8")
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )


def exported(path: Path, server: ComfyServer) -> dict[str, Any]:
    """A workflow on the tiny files as the page exports it; tests/browser shows that it is the same."""
    return to_api(tiny_files.instead_of_published(read(path)), server.object_info())


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_documents_program_draws_each_workflow(path: Path, server: ComfyServer, tmp_path: Path) -> None:
    """What the server gets is what was exported; what the program fetches is what the server saved, about as large as
    the workflow asks for and not flat.
    """
    graph, file = exported(path, server), tmp_path / f"{path.stem}_api.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    done = run(tmp_path, "draw.py", file.name, server.url)
    assert done.returncode == 0, done.stderr + server.log_tail()
    (name,) = done.stdout.split()
    (entry,) = server.get("/history?max_items=1").values()
    assert entry["prompt"][2] == graph
    (saved,) = (picture for picture in server.images(entry) if picture.name == name)
    assert (tmp_path / name).read_bytes() == saved.read_bytes()
    with Image.open(saved) as picture:
        assert 0.8 < picture.width * picture.height / tiny_files.pixels(read(path)) < 1.25
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000, "the picture is flat"


def test_the_program_changes_prompt_and_seed(server: ComfyServer, tmp_path: Path) -> None:
    """The second program of the page, with this server's address for the usual one."""
    graph = exported(FIRST_RUN, server)
    (tmp_path / "bonsai_first_run_api.json").write_text(json.dumps(graph), encoding="utf-8")
    done = run(tmp_path, "-c", programs()[1].replace("draw(graph)", f"draw(graph, {server.url!r})"))
    assert done.returncode == 0, done.stderr + server.log_tail()
    pictures = {
        season: (tmp_path / f"{season}.png").read_bytes() for season in ("spring", "summer", "autumn", "winter")
    }
    assert len(pictures) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pack_name": "nowhere"}, "ComfyUI refused it: .*nowhere"),
        ({"mode": "fastest"}, "ComfyUI refused it: .*fastest"),
    ],
)
def test_the_program_says_what_is_wrong(change: dict[str, str], said: str, server: ComfyServer, tmp_path: Path) -> None:
    graph = exported(FIRST_RUN, server)
    for node in graph.values():
        if node["class_type"] == "LoadBonsaiPack":
            node["inputs"].update(change)
    (tmp_path / "wrong.json").write_text(json.dumps(graph), encoding="utf-8")
    done = run(tmp_path, "draw.py", "wrong.json", server.url)
    assert done.returncode == 1 and re.match(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


# Old graphs


@pytest.mark.parametrize("name", RELEASED)
def test_what_was_released_is_still_there(name: str, every_comfy_server: ComfyServer) -> None:
    """Node, inputs in their order, options and outputs: saved graphs name the first and count the second."""
    node, old = every_comfy_server.object_info(name)[name], RELEASED[name]
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    assert list(inputs)[: len(old.inputs)] == list(old.inputs), f"{name}: new inputs stand last"
    for key, options in old.inputs.items():
        kind, *rest = inputs[key]
        choices = kind if isinstance(kind, list) else (rest[0] if rest else {}).get("options", ())
        assert {*options} <= {*choices}, f"{name}.{key}"
    assert [*node["output"]][: len(old.outputs)] == list(old.outputs), f"{name}: new outputs stand last"
    assert not node.get("deprecated")
