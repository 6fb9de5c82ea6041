"""The shipped workflows in ComfyUI's real page: loaded, checked, queued and watched in Chromium (drive.cjs).

Tests that see the same page (canvas, HTML nodes, a language) stand together: between them it stays open. Some see the
newest page instead of the server's own, which asks the same server.

The published weights cannot be had in a test, so every run uses the files of tiny_files.py. A workflow as shipped, with
its own loaders, is only loaded and compared: the page must name exactly the missing files, with the addresses they can
be downloaded from.

BONSAI_SCREENSHOTS names a folder that keeps the pictures of the page.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_files
from PIL import Image

from bonsai_ops.tools.environment import newest_packages_path
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import to_api

pytestmark = [pytest.mark.browser, pytest.mark.host, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
FIRST_RUN = WORKFLOWS[0]
LANGUAGES = ("zh", "ar")
"""A sample, beside the English of all others; tests/unit/test_locales.py reads them all."""
NEWEST_PAGE = newest_packages_path() / "comfyui_frontend_package" / "static"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVE_SECONDS = 400

CANCELLED = {
    "Bonsai 01": ["LoadBonsaiPack", "CLIPTextEncode", "BonsaiSampler", "VAEDecode"],
    "Bonsai 09": ["CalibrateBitLinear", "PatchToBitLinear", "MeasureBitLinear"],
    "Bonsai 10": ["TrainLoraNode"],
    "Bonsai 14": ["RecoverBitLinear"],
}
"""{beginning of a workflow's name: nodes at which Cancel is pressed, each in a run of its own, before it is run}."""
LOSSES = "LossGraphNode"
ASKED = ("positive", "negative")
WALK = {
    "nodes": {
        "pack": ("Load Bonsai Pack", 260, 130),
        "text": ("CLIP Text Encode (Prompt)", 560, 130),
        "empty": ("Empty Flux 2 Latent", 560, 320),
        "sampler": ("Bonsai Sampler", 860, 130),
        "decode": ("VAE Decode", 1100, 130),
        "picture": ("Save Image", 1340, 130),
        "model": ("Load Bonsai Model", 260, 620),
        "info": ("Bonsai Model Info", 1640, 130),
        "dense": ("Load Diffusion Model", 260, 350),
        "right": ("Right Gradients for Training", 860, 320),
        "encoder": ("Load Bonsai Text Encoder", 260, 480),
        "prompt": ("CLIP Text Encode (Prompt)", 560, 460),
        "sigmas": ("Flux2Scheduler", 260, 790),
        "calibrate": ("Calibrate for BitLinear", 560, 660),
        "patch": ("Patch to BitLinear", 880, 420),
        "measure": ("Measure BitLinear", 880, 700),
        "report": ("Preview as Text", 1220, 760),
        "recover": ("Recover BitLinear", 1220, 470),
        "save": ("Save Bonsai Model", 1600, 560),
    },
    "links": [
        *(("pack", "MODEL", "sampler", "model"), ("pack", "CLIP", "text", "clip"), ("pack", "VAE", "decode", "vae")),
        *(("text", "CONDITIONING", "sampler", "positive"), ("empty", "LATENT", "sampler", "latent")),
        *(("sampler", "LATENT", "decode", "samples"), ("decode", "IMAGE", "picture", "images")),
        *(
            ("model", "MODEL", "info", "model"),
            ("encoder", "CLIP", "prompt", "clip"),
            ("dense", "MODEL", "right", "model"),
        ),
        *(("right", "MODEL", "calibrate", "model"), ("right", "MODEL", "patch", "model")),
        ("calibrate", "calibration", "patch", "calibration"),
        *(("right", "MODEL", node, "original") for node in ("measure", "recover")),
        *(("patch", "MODEL", node, "patched") for node in ("measure", "recover")),
        *(("prompt", "CONDITIONING", node, name) for node in ("calibrate", "measure") for name in ASKED),
        *(("empty", "LATENT", node, "latent") for node in ("calibrate", "measure", "recover")),
        *(("prompt", "CONDITIONING", "recover", "prompts"), ("sigmas", "SIGMAS", "recover", "sigmas")),
        *(("measure", "report", "report", "source"), ("recover", "MODEL", "save", "model")),
    ],
    "values": {
        "pack": {"pack_name": tiny_files.SHIPPED_PACK},
        "model": {"model_name": tiny_files.MODEL},
        "dense": {"unet_name": tiny_files.DENSE},
        "encoder": {"text_encoder_name": tiny_files.ENCODER},
        "text": {"text": "a green bonsai tree in a blue pot, summer"},
        "empty": {"width": 128, "height": 128},
        "sigmas": {"steps": 2, "width": 128, "height": 128},
        "patch": {"rank": 16},
        "measure": {"steps": 1},
        "recover": {"points": 8, "steps": 1, "batch": 1},
        "save": {"filename_prefix": "page/walk"},
    },
}
"""A graph of all our nodes: title and place in the window of each, links, and values other than the defaults."""

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Page:
    """Has drive.cjs, in `process`, use the page of one server."""

    server: ComfyServer
    process: subprocess.Popen[str]
    folder: Path
    pictures: Path

    def drive(self, name: str, graph: dict[str, Any], **job: object) -> dict[str, Any]:
        """What drive.cjs answers for `graph`; the job's file and the picture of the page are called `name`."""
        workflow, order = self.folder / f"{name}.workflow.json", self.folder / f"{name}.job.json"
        screenshot = self.pictures / f"{name}.png"
        workflow.write_text(json.dumps(graph), encoding="utf-8")
        given = {"url": self.server.url, "graph": str(workflow), "screenshot": str(screenshot), **job}
        order.write_text(json.dumps(given), encoding="utf-8")
        watch = threading.Timer(DRIVE_SECONDS, self.process.kill)
        watch.start()
        try:
            print(order, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        finally:
            watch.cancel()
        assert line, f"drive.cjs ended or took more than {DRIVE_SECONDS} s\n{self.server.log_tail()}"
        answer = json.loads(line)
        assert "failed" not in answer, f"{answer['failed']}\n{self.server.log_tail()}"
        with Image.open(screenshot) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100, "the page is empty"
        return answer


@pytest.fixture(scope="module")
def tools() -> tuple[str, str]:
    """Paths of Node.js and Chromium; skips where one of them or playwright-core is missing."""
    node = shutil.which("node")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if node is None:
        pytest.skip("no Node.js here: install node to run the browser tests")
    if chromium is None:
        pytest.skip(f"no Chromium here: install one of {', '.join(CHROMIUM)} to run the browser tests")
    found = subprocess.run([node, "-e", "require.resolve('playwright-core')"], capture_output=True)
    if found.returncode != 0:
        pytest.skip("no playwright-core here: npm install playwright-core and name its node_modules in NODE_PATH")
    return node, chromium


@pytest.fixture(scope="module")
def page(
    tools: tuple[str, str], comfy_server: Callable[..., ComfyServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The page of a running server that has the tiny pack and a LoRA for it; they are removed at the end."""
    server = comfy_server()
    folder = tmp_path_factory.mktemp("page")
    pictures = Path(os.environ.get("BONSAI_SCREENSHOTS") or folder)
    pictures.mkdir(parents=True, exist_ok=True)
    node, chromium = tools
    command = [node, str(Path(__file__).with_name("drive.cjs")), chromium]
    with (
        tiny_files.written(server.base_directory),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process,
    ):
        yield Page(server, process, folder, pictures)
        process.stdin.close()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def values_of(graph: dict[str, Any]) -> dict[str, list]:
    return {str(node["id"]): node.get("widgets_values") or [] for node in graph["nodes"]}


def pictures_of(
    graph: dict[str, Any],
    answer: dict[str, Any],
    server: ComfyServer,
    kind: str = "SaveImage",
    title: str | None = None,
) -> list[Path]:
    """The files that the nodes of this kind, or of this kind and title, wrote."""
    files = []
    for node in graph["nodes"]:
        if node["type"] == kind and title in (None, node.get("title")):
            for image in answer["outputs"][str(node["id"])]["images"]:
                files.append(server.base_directory / image["type"] / image["subfolder"] / image["filename"])
    return files


def assert_trained(graph: dict[str, Any], answer: dict[str, Any], server: ComfyServer, after: Path) -> None:
    """The page shows the losses, a line; the picture before is another one than that after the two steps of a test."""
    (number,) = (str(node["id"]) for node in graph["nodes"] if node["type"] == LOSSES)
    assert answer["shown"][number]["pictures"] == 1
    (losses,) = pictures_of(graph, answer, server, LOSSES)
    with Image.open(losses) as picture:
        assert (0, 0, 255) in {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    (before,) = pictures_of(graph, answer, server, "PreviewImage", "Before")
    with Image.open(before) as first, Image.open(after) as second:
        assert first.size == second.size and first.convert("RGB").tobytes() != second.convert("RGB").tobytes()


@each_workflow
def test_workflow_runs(path: Path, page: Page) -> None:
    graph = tiny_files.instead_of_published(read(path))
    stages = next((kinds for name, kinds in CANCELLED.items() if path.stem.startswith(name)), [])
    answer = page.drive(f"{path.stem}-run", graph, run=True, export=True, cancel=stages)
    assert answer["cancelled"] == {stage: ["interrupted"] for stage in stages}
    assert answer["errors"] == [], page.server.log_tail()
    assert answer["types"] == [] and answer["missing"] == [] and answer["media"] == []
    assert answer["widgets"] == values_of(graph)
    assert answer["outside"] == []
    exported = {number: {**node, "_meta": None} for number, node in answer["exported"].items()}
    queued = to_api(graph, page.server.object_info())
    assert exported == {number: {**node, "_meta": None} for number, node in queued.items()}
    (file,) = pictures_of(graph, answer, page.server)
    if LOSSES in {node["type"] for node in graph["nodes"]}:
        assert_trained(graph, answer, page.server, file)
    with Image.open(file) as picture:
        assert picture.width % 32 == 0 and picture.height % 32 == 0
        assert 0.8 < picture.width * picture.height / tiny_files.pixels(read(path)) < 1.25
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000, "the picture is flat"


def test_a_picture_dropped_on_the_page_opens_its_workflow(page: Page) -> None:
    """One that Save Image wrote, on an emptied page: nodes, values and links are those that drew it."""
    graph = read(FIRST_RUN)
    drawn = page.drive("sent", graph, run=True)
    assert drawn["errors"] == [], page.server.log_tail()
    (picture,) = pictures_of(graph, drawn, page.server)
    answer = page.drive("dropped", graph, run=False, drop=str(picture))
    assert answer["errors"] == []
    opened = answer["dropped"]
    assert {node["id"]: node["type"] for node in opened["nodes"]} == {n["id"]: n["type"] for n in graph["nodes"]}
    assert values_of(opened) == values_of(graph)
    assert [link[1:] for link in opened["links"]] == [link[1:] for link in graph["links"]]


def empty() -> dict[str, Any]:
    """A workflow without a node."""
    return {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}


def walk(driver: Page, name: str, seed: int, **seen: object) -> None:
    """All our nodes, found by their titles, put down and connected with the mouse, and run: what each then shows.

    seed: another one each time, for a page shows nothing of what the server took from its cache.
    """
    values = {**WALK["values"], "calibrate": {"steps": 1, "seed": seed}}
    answer = driver.drive(name, empty(), build={**WALK, "values": values}, run=True, search="1 bit", **seen)
    built = answer["built"]
    assert built["missing"] == []
    assert answer["errors"] == [], driver.server.log_tail()
    shown = {name: answer["shown"][str(number)] for name, number in built["ids"].items()}
    outputs = {name: answer["outputs"].get(str(number)) for name, number in built["ids"].items()}
    for node in ("picture", "info", "patch", "measure", "recover"):
        assert shown[node]["pictures"] == 1, node
    for node in ("pack", "model", "encoder", "info", "calibrate", "patch", "measure", "recover", "save"):
        assert shown[node]["width"] >= 400, node
    assert shown["save"]["pictures"] == 0 and "walk" in shown["save"]["texts"][0]
    assert shown["save"]["cut"] == 0 and shown["calibrate"]["cut"] == 0
    assert "21 of 21 layers" in shown["calibrate"]["texts"][0]
    assert "error" in outputs["report"]["text"][0]
    assert any("Load Bonsai Model" in offered for offered in answer["found"])  # by words that are not in its name


def test_walk(page: Page) -> None:
    """Drawn on the canvas."""
    walk(page, "walk-canvas", seed=1)


def test_the_page_says_what_is_wrong_with_a_file(page: Page) -> None:
    """With a Git LFS pointer in place of a model: file, finding and cure, one click behind the red box."""
    file = page.server.base_directory / "models" / "diffusion_models" / "pointer.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1430000000\n", encoding="utf-8")
    graph = {
        "nodes": {"model": ("Load Bonsai Model", 300, 200), "info": ("Bonsai Model Info", 900, 200)},
        "links": [("model", "MODEL", "info", "model")],
        "values": {"model": {"model_name": file.name}},
    }
    try:
        answer = page.drive("wrong-file", empty(), build=graph, run=True, complaint=True)
    finally:
        file.unlink()
    assert len(answer["errors"]) == 1 and "PackError" in answer["errors"][0]
    for words in (file.name, "is a Git LFS pointer", "git lfs pull"):
        assert words in answer["complaint"]


def saving() -> dict[str, Any]:
    """A workflow of nothing but Save Image."""
    node = {"id": 1, "type": "SaveImage", "pos": [600, 80], "widgets_values": ["page/blueprint"]}
    return {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4}


@pytest.mark.parametrize("name", ["Text to Image (Bonsai)", "Text to Image with LoRA (Bonsai)"])
def test_a_blueprint_is_found_and_draws(name: str, page: Page) -> None:
    """One node with prompt, size and seed, put onto the graph by a search, draws with what the plugin brings."""
    (shipped,) = read(REPOSITORY / "subgraphs" / f"{name}.json")["nodes"]
    graph = saving()
    answer = page.drive(f"blueprint-{name}", graph, run=True, vue=True, insert=name)
    assert answer["errors"] == [], page.server.log_tail()
    assert answer["inserted"]["title"] == name
    shown = {widget: value for widget, _, value in answer["inserted"]["widgets"]}
    names = [entry["name"] for entry in shipped["inputs"] if "widget" in entry]
    assert {widget: shown[widget] for widget in names} == dict(zip(names, shipped["widgets_values"], strict=True))
    assert {"text", "width", "height", "seed"} <= {*names}
    (file,) = pictures_of(graph, answer, page.server)
    with Image.open(file) as picture:
        assert picture.size == (128, 128) and len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_the_search_for_templates_finds_the_first_run(page: Page) -> None:
    """By the words of README it stands first."""
    answer = page.drive("templates", read(FIRST_RUN), run=False, vue=True, browse="bonsai 01")
    assert answer["errors"] == [] and answer["offered"][0] == FIRST_RUN.stem


def test_help_opens_on_the_page(page: Page) -> None:
    """With its table of inputs and its picture."""
    answer = page.drive("help", read(FIRST_RUN), run=False, vue=True, help="BonsaiSampler")
    assert answer["errors"] == []
    assert "Typical wiring" in answer["help"]["text"] and "denoise" in answer["help"]["text"]
    assert len(answer["help"]["pictures"]) == 1 and answer["help"]["pictures"][0] >= 400


def test_the_app_opens_and_draws(page: Page) -> None:
    """A page with what one asks for and a button instead of the graph."""
    (path,) = (path for path in WORKFLOWS if path.stem.endswith("as an app"))
    answer = page.drive("app", read(path), run=False, vue=True, template=path.stem, app=True)
    assert answer["errors"] == [] and answer["app"]["errors"] == [], page.server.log_tail()
    assert answer["app"]["inputs"] == ["prompt", "width", "height", "seed"]
    assert 128 in answer["app"]["pictures"]


@each_workflow
def test_workflow_as_shipped_names_its_files(path: Path, page: Page) -> None:
    """Clicked in the template browser of the newest page, drawn as HTML nodes, the other way pages draw them."""
    graph = read(path)
    answer = page.drive(f"{path.stem}-shipped", graph, run=False, vue=True, template=path.stem, page=str(NEWEST_PAGE))
    assert answer["errors"] == [] and answer["types"] == []
    assert answer["widgets"] == values_of(graph)
    assert answer["media"] == [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoadImage"]
    shipped = [{"node": str(n["id"]), **model} for n in graph["nodes"] for model in n["properties"].get("models", ())]
    missing = [model for model in answer["missing"] if model.get("url")]
    assert sorted(missing, key=str) == sorted(shipped, key=str)
    brought = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] in tiny_files.NOT_SHIPPED]
    assert {model["name"] for model in answer["missing"]} - {model["name"] for model in shipped} <= {*brought}
    assert answer["outside"] == []


def test_walk_on_the_newest_page(page: Page) -> None:
    """Drawn as HTML nodes."""
    walk(page, "walk-newest", seed=2, vue=True, page=str(NEWEST_PAGE))


@pytest.mark.parametrize("language", LANGUAGES)
def test_page_shows_translated_titles(language: str, page: Page) -> None:
    texts = read(REPOSITORY / "locales" / language / "nodeDefs.json")
    graph = read(WORKFLOWS[1])
    answer = page.drive(f"titles-{language}", graph, run=False, locale=language)
    assert {texts["LoadBonsaiModel"]["display_name"], texts["BonsaiSampler"]["display_name"]} <= set(answer["titles"])
