"""Draws the pictures of README's tour, and what the template that opens as an app shows, again:

    python -m tests.browser.draw_tour

Needs what the browser tests need, and the environment of the tests. Drawn with the seedling, on ComfyUI's own page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from bonsai_ops.tools.environment import PLUGIN

from .draw_help import save, shots

PICTURES = PLUGIN / "docs" / "tour"
WORKFLOWS = PLUGIN / "workflows"
FIRST = WORKFLOWS / "Bonsai 01 - First run, no download.json"
APP = WORKFLOWS / "Bonsai 12 - First run as an app.json"
SIZE, SCALE = (1440, 800), 0.8
SHARE = (0.11, 0.19, 0.89, 0.8)
"""Of a picture of the page: where its nodes are, as fractions (left, top, right, bottom)."""
APP_SIZE, THUMBNAIL = (900, 900), (512, 512)
PROMPT = "two green bonsai trees in blue pots, summer"


def _graph(path: Path) -> dict[str, Any]:
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] == "BonsaiSampler":
            node["widgets_values"][1] = "fixed"
        if node["type"] == "CLIPTextEncode":
            node["widgets_values"][0] = PROMPT
    return graph


def _with_lora() -> dict[str, Any]:
    """The first run without its note, with a LoRA, Bonsai Model Info and Save Bonsai Model behind Load Bonsai Pack."""
    graph = _graph(FIRST)
    graph["groups"] = []
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    kinds = {node["type"]: node for node in graph["nodes"]}
    kinds["LoadBonsaiPack"]["outputs"][0]["links"] = [8]
    kinds["CLIPTextEncode"]["pos"], kinds["EmptyFlux2LatentImage"]["pos"] = [848, 30], [848, 280]
    kinds["BonsaiSampler"]["pos"] = [848, 470]
    kinds["BonsaiSampler"]["inputs"][0]["link"] = 9
    added = [
        ("LoraLoaderModelOnly", [416, 320], [380, 90], ["seedling_night.safetensors", 1.0], 8),
        ("SaveBonsaiModel", [416, 490], [380, 150], ["diffusion_models/night", True], 10),
        ("BonsaiModelInfo", [1752, 30], [460, 580], [], 11),
    ]
    graph["links"] = [link for link in graph["links"] if link[0] != 1]
    for number, (kind, position, size, values, link) in enumerate(added, 8):
        node = {"id": number, "type": kind, "pos": position, "size": size, "widgets_values": values}
        node["inputs"] = [{"name": "model", "type": "MODEL", "link": link}]
        graph["nodes"].append({**node, "outputs": [], "properties": {}})
    graph["nodes"][-3]["outputs"] = [{"name": "MODEL", "type": "MODEL", "links": [9, 10, 11]}]
    sampler = kinds["BonsaiSampler"]["id"]
    graph["links"] += [[8, 2, 0, 8, 0, "MODEL"], [9, 8, 0, sampler, 0, "MODEL"]]
    graph["links"] += [[10, 8, 0, 9, 0, "MODEL"], [11, 8, 0, 10, 0, "MODEL"]]
    return {**graph, "last_node_id": 10, "last_link_id": 11}


def main(argv: list[str]) -> None:
    """Draw them all."""
    argparse.ArgumentParser(prog="python -m tests.browser.draw_tour", description=__doc__).parse_args(argv)
    PICTURES.mkdir(exist_ok=True)
    jobs = {
        "first-run": {"graph": _graph(FIRST), "run": True, "vue": True, "size": SIZE},
        "lora": {"graph": _with_lora(), "run": True, "vue": True, "size": SIZE},
        "templates": {"graph": _graph(FIRST), "browse": "bonsai 01", "vue": True, "size": SIZE},
        "app": {"graph": _graph(APP), "template": APP.stem, "app": True, "vue": True, "size": APP_SIZE},
    }
    with tempfile.TemporaryDirectory() as folder:
        pictures = shots(jobs, Path(folder))
    pictures.pop("app").resize(THUMBNAIL, Image.Resampling.LANCZOS).save(APP.with_suffix(".jpg"), quality=85)
    for name, picture in pictures.items():
        box = (round(share * SIZE[edge % 2]) for edge, share in enumerate(SHARE))
        save(picture if name == "templates" else picture.crop(tuple(box)), SCALE, PICTURES / f"{name}.webp")


if __name__ == "__main__":
    main(sys.argv[1:])
