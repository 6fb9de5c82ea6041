"""The shipped workflows in ComfyUI's real page: loaded, checked, queued and watched in Chromium (drive.cjs).

The published weights cannot be had in a test, so every run uses a tiny pack of random weights; the pictures are noise.
File names are replaced by those of that pack. ComfyUI's own CLIPLoader and VAELoader accept only text encoders and VAEs
of the published widths, so in the runs they are taken out and their links start at a Load Bonsai Pack node instead. All
other nodes, values and links run as shipped. A workflow as shipped, with its own loaders, is only loaded and
compared: the page must name exactly the missing files, with the addresses they can be downloaded from.

BONSAI_SCREENSHOTS names a folder that keeps the pictures of the page.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bonsai_ops.environment import NEWEST
from bonsai_ops.server import ComfyServer
from bonsai_ops.synthetic import TINY, write_pipeline

pytestmark = [pytest.mark.browser, pytest.mark.host, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
LANGUAGES = sorted(path.name for path in (REPOSITORY / "locales").iterdir())
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACK, MODEL, PICTURE = "browser-tiny", "browser-tiny.safetensors", "browser-tiny.png"
LORA, LORA_RANK = "browser-tiny-lora.safetensors", 4
REPLACED = {"LoadBonsaiModel": MODEL, "LoadBonsaiPack": PACK, "LoadImage": PICTURE, "LoraLoaderModelOnly": LORA}
NOT_SHIPPED = {"LoadImage": PICTURE, "LoraLoaderModelOnly": LORA}
"""Node: file that takes the place of one that the user brings, for which the workflow names no address."""
STOCK_LOADERS = {"CLIPLoader": 1, "VAELoader": 2}
"""Loader: output of Load Bonsai Pack that takes its place."""
DRIVE_SECONDS = 400

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Page:
    """Runs drive.cjs against one server."""

    server: ComfyServer
    node: str
    chromium: str
    folder: Path
    pictures: Path

    def drive(self, name: str, graph: dict[str, Any], **job: object) -> dict[str, Any]:
        """What drive.cjs answers for `graph`; the job's file and the picture of the page are called `name`."""
        workflow, order = self.folder / f"{name}.workflow.json", self.folder / f"{name}.job.json"
        workflow.write_text(json.dumps(graph), encoding="utf-8")
        order.write_text(
            json.dumps(
                {
                    "url": self.server.url,
                    "chromium": self.chromium,
                    "graph": str(workflow),
                    "screenshot": str(self.pictures / f"{name}.png"),
                    **job,
                }
            ),
            encoding="utf-8",
        )
        done = subprocess.run(
            [self.node, str(Path(__file__).with_name("drive.cjs")), str(order)],
            capture_output=True,
            encoding="utf-8",
            timeout=DRIVE_SECONDS,
        )
        assert done.returncode == 0, f"{done.stderr}\n{self.server.log_tail()}"
        with Image.open(self.pictures / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100, "the page is empty"
        return json.loads(done.stdout)


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


def write_lora(path: Path) -> None:
    """A plain LoRA for one packed layer of the tiny pack, named as LoRAs for FLUX.2 Klein are."""
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    down, up = torch.randn(LORA_RANK, TINY.hidden), torch.randn(3 * TINY.hidden, LORA_RANK)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{layer}.lora_A.weight": down / TINY.hidden**0.5, f"{layer}.lora_B.weight": up / LORA_RANK**0.5}, path)


def write_picture(path: Path) -> None:
    """A gradient whose middle is masked: Load Image makes the mask from what is transparent."""
    picture = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (100, 50, 200, 150))
    picture.putalpha(alpha)
    picture.save(path)


@pytest.fixture(scope="module")
def page(
    tools: tuple[str, str], comfy_server: Callable[..., ComfyServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The page of a running server that has the tiny pack and a LoRA for it; they are removed at the end."""
    server = comfy_server(NEWEST)
    models, picture = server.base_directory / "models", server.base_directory / "input" / PICTURE
    pack, model, lora = models / "bonsai" / PACK, models / "diffusion_models" / MODEL, models / "loras" / LORA
    write_pipeline(pack, variant="ternary", seed=0)
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(pack / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors", model)
    write_lora(lora)
    write_picture(picture)
    folder = tmp_path_factory.mktemp("page")
    pictures = Path(os.environ.get("BONSAI_SCREENSHOTS") or folder)
    pictures.mkdir(parents=True, exist_ok=True)
    yield Page(server, *tools, folder, pictures)
    shutil.rmtree(pack)
    for file in (model, lora, picture):
        file.unlink()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def with_tiny_pack(graph: dict[str, Any]) -> dict[str, Any]:
    """The workflow with the tiny pack's names, and Load Bonsai Pack instead of ComfyUI's own loaders."""
    for node in graph["nodes"]:
        node["properties"].pop("models", None)
        if node["type"] in REPLACED:
            node["widgets_values"][0] = REPLACED[node["type"]]
    replaced = {node["id"]: STOCK_LOADERS[node["type"]] for node in graph["nodes"] if node["type"] in STOCK_LOADERS}
    if not replaced:
        return graph
    graph["last_node_id"] += 1
    outputs = [{"name": kind, "type": kind, "links": []} for kind in ("MODEL", "CLIP", "VAE")]
    for link in graph["links"]:
        if link[1] in replaced:
            link[1], link[2] = graph["last_node_id"], replaced[link[1]]
            outputs[link[2]]["links"].append(link[0])
    graph["nodes"] = [node for node in graph["nodes"] if node["id"] not in replaced]
    graph["nodes"].append(
        {
            "id": graph["last_node_id"],
            "type": "LoadBonsaiPack",
            "pos": [520, 236],
            "size": [420, 198],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": outputs,
            "properties": {},
            "widgets_values": [PACK, "auto", "auto", "exact", "compact"],
        }
    )
    return graph


def values_of(graph: dict[str, Any]) -> dict[str, list]:
    return {str(node["id"]): node.get("widgets_values") or [] for node in graph["nodes"]}


def saved_pictures(graph: dict[str, Any], answer: dict[str, Any], server: ComfyServer) -> list[Path]:
    """The files that the Save Image nodes wrote."""
    files = []
    for node in graph["nodes"]:
        if node["type"] == "SaveImage":
            for image in answer["outputs"][str(node["id"])]["images"]:
                files.append(server.base_directory / image["type"] / image["subfolder"] / image["filename"])
    return files


@each_workflow
def test_workflow_runs(path: Path, page: Page) -> None:
    graph = with_tiny_pack(read(path))
    answer = page.drive(f"{path.stem}-run", graph, run=True)
    assert answer["errors"] == [], page.server.log_tail()
    assert answer["types"] == [] and answer["missing"] == [] and answer["media"] == []
    assert answer["widgets"] == values_of(graph)
    (file,) = saved_pictures(graph, answer, page.server)
    with Image.open(file) as picture:
        assert picture.width % 32 == 0 and picture.height % 32 == 0
        assert 0.8 < picture.width * picture.height / 512**2 < 1.25
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000, "the picture is flat"


@each_workflow
def test_workflow_as_shipped_names_its_files(path: Path, page: Page) -> None:
    """Drawn as HTML nodes, the other way the page draws them. Node titles are those of the schemas."""
    graph = read(path)
    for node in graph["nodes"]:
        if node["type"] in NOT_SHIPPED:
            node["widgets_values"][0] = NOT_SHIPPED[node["type"]]
    answer = page.drive(f"{path.stem}-shipped", graph, run=False, vue=True)
    assert answer["errors"] == [] and answer["types"] == [] and answer["media"] == []
    assert answer["widgets"] == values_of(graph)
    shipped = [{"node": str(n["id"]), **model} for n in graph["nodes"] for model in n["properties"].get("models", ())]
    assert sorted(answer["missing"], key=str) == sorted(shipped, key=str)


@pytest.mark.parametrize("language", LANGUAGES)
def test_page_shows_translated_titles(language: str, page: Page) -> None:
    texts = read(REPOSITORY / "locales" / language / "nodeDefs.json")
    graph = read(REPOSITORY / "workflows" / "bonsai_text_to_image.json")
    answer = page.drive(f"titles-{language}", graph, run=False, locale=language)
    assert {texts["LoadBonsaiModel"]["display_name"], texts["BonsaiSampler"]["display_name"]} <= set(answer["titles"])
