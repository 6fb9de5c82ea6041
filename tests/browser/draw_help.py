"""Draws the graphs in the help pages again, on the page: python -m tests.browser.draw_help [NODE ..]

Needs what the browser tests need, and the environment of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bonsai_ops.tools.environment import NEWEST, PLUGIN, comfyui_path, link_plugin
from bonsai_ops.tools.server import ComfyServer

PICTURES = PLUGIN / "web" / "docs" / "graphs"
SCALE = 0.75
"""Of what is kept: a help panel is narrow."""
QUALITY = 80

Node = tuple[str, int, int, int, dict[str, Any]]
"""(class, x, y, width, inputs)"""
Graph = dict[str, Node]
"""{id: node}"""

TERNARY, DENSE_NAME = "bonsai-image-ternary-4B-mlx-2bit.safetensors", "flux-2-klein-4b.safetensors"
FILES = (
    f"diffusion_models/{TERNARY}",
    f"diffusion_models/{DENSE_NAME}",
    "text_encoders/Qwen3-4B-4bit.safetensors",
    "vae/flux2-vae.safetensors",
    "loras/style.safetensors",
)
LOADED = {"compute_dtype": "auto", "memory": "auto", "mode": "exact", "layout": "compact"}
BONSAI = ("LoadBonsaiModel", 0, 0, 350, {"model_name": TERNARY, **LOADED})
DENSE = ("UNETLoader", 0, 0, 350, {"unet_name": DENSE_NAME, "weight_dtype": "default"})
LORA = ("LoraLoaderModelOnly", 390, 0, 290, {"model": ["1", 0], "lora_name": "style.safetensors", "strength_model": 1})


def _encoder(x: int, y: int) -> Node:
    return ("LoadBonsaiTextEncoder", x, y, 350, {"text_encoder_name": "Qwen3-4B-4bit.safetensors"})


def _prompt(x: int, y: int, clip: str = "text", output: int = 0) -> Node:
    return ("CLIPTextEncode", x, y, 290, {"text": "a bonsai tree in a blue pot, autumn", "clip": [clip, output]})


def _empty(x: int, y: int) -> Node:
    return ("EmptyFlux2LatentImage", x, y, 290, {"width": 512, "height": 512, "batch_size": 1})


def _sampler(x: int, y: int, model: str) -> Node:
    inputs = {"model": [model, 0], "positive": ["prompt", 0], "seed": 7, "steps": 4, "denoise": 1.0}
    return ("BonsaiSampler", x, y, 270, {**inputs, "latent": ["empty", 0]})


def _patch(x: int, y: int, **inputs: Any) -> Node:
    values = {"scheme": "ternary", "group_size": "128", "rank": 32, "target_size_mb": 0, "include": "*"}
    return ("PatchToBitLinear", x, y, 330, {"model": ["1", 0], **values, "exclude": "", "dry_run": False, **inputs})


def _samples(kind: str, x: int, y: int, **inputs: Any) -> Node:
    sampling = {"seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    conditions = {"positive": ["prompt", 0], "negative": ["prompt", 0], "latent": ["empty", 0]}
    return (kind, x, y, 290, {**inputs, **conditions, **sampling})


GRAPHS: dict[str, Graph] = {
    "LoadBonsaiPack": {
        "1": ("LoadBonsaiPack", 0, 0, 350, {"pack_name": TERNARY.partition(".")[0], **LOADED}),
        "prompt": _prompt(390, 0, "1", 1),
        "empty": _empty(390, 210),
        "sampler": _sampler(720, 0, "1"),
        "decode": ("VAEDecode", 720, 210, 270, {"samples": ["sampler", 0], "vae": ["1", 2]}),
    },
    "LoadBonsaiModel": {
        "1": BONSAI,
        "lora": LORA,
        "text": _encoder(0, 210),
        "prompt": _prompt(390, 130),
        "empty": _empty(390, 330),
        "sampler": _sampler(720, 0, "lora"),
    },
    "LoadBonsaiTextEncoder": {
        "text": _encoder(0, 0),
        "prompt": _prompt(390, 0),
        "empty": _empty(390, 210),
        "1": ("LoadBonsaiModel", 0, 130, 350, BONSAI[-1]),
        "sampler": _sampler(720, 0, "1"),
    },
    "BonsaiSampler": {
        "1": BONSAI,
        "text": _encoder(0, 210),
        "vae": ("VAELoader", 0, 320, 350, {"vae_name": "flux2-vae.safetensors"}),
        "prompt": _prompt(390, 0),
        "empty": _empty(390, 210),
        "sampler": _sampler(720, 0, "1"),
        "decode": ("VAEDecode", 720, 220, 270, {"samples": ["sampler", 0], "vae": ["vae", 0]}),
    },
    "SaveBonsaiModel": {
        "1": BONSAI,
        "lora": LORA,
        "save": (
            "SaveBonsaiModel",
            720,
            0,
            330,
            {"model": ["lora", 0], "filename_prefix": "diffusion_models/styled", "include_loras": True},
        ),
    },
    "BonsaiModelInfo": {
        "1": BONSAI,
        "info": ("BonsaiModelInfo", 390, 0, 270, {"model": ["1", 0]}),
        "picture": ("PreviewImage", 700, 0, 200, {"images": ["info", 1]}),
    },
    "PatchToBitLinear": {
        "1": DENSE,
        "patch": _patch(390, 0),
        "save": (
            "SaveBonsaiModel",
            760,
            0,
            330,
            {"model": ["patch", 0], "filename_prefix": "diffusion_models/packed", "include_loras": False},
        ),
        "report": ("PreviewAny", 760, 150, 330, {"source": ["patch", 1]}),
        "sampler": ("KSampler", 760, 310, 330, {"model": ["patch", 0], "seed": 7, "steps": 4, "cfg": 1.0}),
    },
    "CalibrateBitLinear": {
        "1": DENSE,
        "text": _encoder(0, 130),
        "prompt": _prompt(0, 240),
        "empty": _empty(0, 440),
        "calibrate": _samples("CalibrateBitLinear", 390, 0, model=["1", 0], mode="power"),
        "patch": _patch(720, 0, calibration=["calibrate", 0]),
    },
    "MeasureBitLinear": {
        "1": DENSE,
        "text": _encoder(0, 130),
        "prompt": _prompt(0, 240),
        "empty": _empty(0, 440),
        "patch": _patch(390, 0),
        "measure": _samples("MeasureBitLinear", 760, 0, original=["1", 0], patched=["patch", 0]),
        "report": ("PreviewAny", 760, 390, 290, {"source": ["measure", 0]}),
    },
    "RecoverBitLinear": {
        "1": DENSE,
        "text": _encoder(0, 130),
        "prompt": _prompt(0, 240),
        "empty": _empty(390, 380),
        "patch": _patch(390, 0),
        "schedule": ("Flux2Scheduler", 0, 440, 290, {"steps": 4, "width": 512, "height": 512}),
        "recover": (
            "RecoverBitLinear",
            760,
            0,
            290,
            {
                **{"original": ["1", 0], "patched": ["patch", 0], "prompts": ["prompt", 0], "latent": ["empty", 0]},
                **{"sigmas": ["schedule", 0], "seed": 7, "points": 320, "steps": 120, "batch": 8},
                **{"learning_rate": 0.001, "minutes": 0},
            },
        ),
        "save": (
            "SaveBonsaiModel",
            1090,
            0,
            290,
            {"model": ["recover", 0], "filename_prefix": "diffusion_models/packed", "include_loras": False},
        ),
        "report": ("PreviewAny", 1090, 180, 290, {"source": ["recover", 1]}),
    },
    "BonsaiRightGradients": {
        "1": DENSE,
        "right": ("BonsaiRightGradients", 390, 0, 270, {"model": ["1", 0]}),
        "train": ("TrainLoraNode", 700, 0, 330, {"model": ["right", 0]}),
    },
}
"""Those of "Typical wiring". A prompt stands for the negative one too, where guidance is off."""


def main(argv: list[str]) -> int:
    """Draws the pictures of the nodes named, or of all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser.draw_help", description=__doc__)
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="its picture only, such as BonsaiSampler")
    names = parser.parse_args(argv).nodes or list(GRAPHS)
    if unknown := {*names} - {*GRAPHS}:
        parser.error(f"no graph for {', '.join(sorted(unknown))}")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        orders = {name: _order(name) for name in names}
        for name, picture in shots(orders, Path(folder), FILES).items():
            save(picture, SCALE, PICTURES / f"{name}.webp")
    return 0


def shots(jobs: dict[str, dict[str, Any]], work: Path, files: Sequence[str] = ()) -> dict[str, Image.Image]:
    """{name: picture of the page} of jobs for drive.cjs, one after the other; each job's graph is given as it is.

    files: paths below models/ that are there, empty, for the page marks what it does not find. work: an empty folder.
    Raises SystemExit when something needed is missing or a job fails.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    node = shutil.which("node")
    if chromium is None or node is None:
        raise SystemExit("Chromium or Node.js is missing: this draws on ComfyUI's page.")
    link_plugin(work / "base")
    for name in files:
        (work / "base" / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "base" / "models" / name).touch()
    orders = [work / f"{number}.job.json" for number in range(len(jobs))]
    with ComfyServer(Path(sys.executable), comfyui_path(NEWEST), work / "base") as server:
        for order, job in zip(orders, jobs.values(), strict=True):
            graph = order.with_suffix(".graph")
            graph.write_text(json.dumps(job["graph"]), encoding="utf-8")
            order.write_text(
                json.dumps({**job, "url": server.url, "graph": str(graph), "screenshot": f"{order}.png"}),
                encoding="utf-8",
            )
        command = [node, str(Path(__file__).with_name("drive.cjs")), chromium]
        lines = "\n".join(map(str, orders))
        done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        bad = [answer for answer in answers if answer.get("failed") or answer.get("errors")]
        if bad or len(answers) < len(jobs):
            raise SystemExit(f"{bad}\n{server.log_tail()}")
    return {name: Image.open(f"{order}.png").convert("RGB") for name, order in zip(jobs, orders, strict=True)}


def save(picture: Image.Image, scale: float, path: Path) -> None:
    """Write a picture of the page as .webp."""
    size = round(picture.width * scale), round(picture.height * scale)
    picture.resize(size, Image.Resampling.LANCZOS).save(path, quality=QUALITY, method=6)


def _order(name: str) -> dict[str, Any]:
    """The job of one picture for drive.cjs."""
    graph = {number: {"class_type": kind, "inputs": inputs} for number, (kind, *_, inputs) in GRAPHS[name].items()}
    return {"graph": graph, "places": {number: place for number, (_, *place, _) in GRAPHS[name].items()}}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
