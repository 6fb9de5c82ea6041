"""The shipped workflow that trains a LoRA, run as users run it: does everything turn to night?

In a real ComfyUI the template that trains the seedling is queued as it ships, and once more with the dense model of the
seedling's values in place of the packed one, behind Right Gradients for Training. What Save LoRA Weights wrote is
loaded by Load LoRA, each onto the model that it was trained on. Pictures of prompts that name no background, of
combinations that the seedling never saw, are read back by the judge.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from bonsai_ops.tools.environment import PLUGIN, link_plugin
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import find_nodes, to_api
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

from .captions import caption
from .judge import judge
from .scene import JUDGED, Scene, random_scene

WORKFLOW = PLUGIN / "workflows" / "Bonsai 10 - Train a LoRA, no download.json"
PACK = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
DENSE = "seedling-dense.safetensors"
ATTRIBUTE, VALUE = "background", "night"
PROMPTS, SIDE, SECONDS = 40, 128, 3000


def show(work: Path, comfyui: Path) -> None:
    """Prints the shares of night skies and of the other attributes without and with each LoRA."""
    base = work / "night"
    link_plugin(base)
    dense = base / "models" / "diffusion_models" / DENSE
    dense.parent.mkdir(parents=True, exist_ok=True)
    weights = read_weights(open_transformer(PACK))
    values = {n: w.dequantize() if isinstance(w, PackedWeight) else w.float() for n, w in weights.items()}
    save_file({name: value.contiguous() for name, value in values.items()}, dense)
    with ComfyServer(Path(sys.executable), comfyui, base) as server:
        workflow = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
        for kind in ("packed", "dense"):
            started = time.monotonic()
            lora = _train(server, workflow, kind)
            seconds = time.monotonic() - started
            print(f"{kind}: trained in {seconds:.0f} s with the training pictures", flush=True)
            for name in (None, lora) if kind == "packed" else (lora,):
                shares = _shares(server, kind, name)
                text = " ".join(f"{attribute} {100 * share:.1f}" for attribute, share in shares.items())
                print(f"{kind} {'with the LoRA' if name else 'alone'}: {VALUE} {text}", flush=True)


def held_out(count: int) -> list[tuple[Scene, str]]:
    """Scenes that the seedling never saw, not at night, with prompts that name all but the background."""
    rng, scenes = random.Random("held out nights"), []
    while len(scenes) < count:
        scene = random_scene(rng, held_out=True)
        if getattr(scene, ATTRIBUTE) != VALUE:
            scenes.append(scene)
    return [(scene, caption(scene, rng, omit=0.0, silent=(ATTRIBUTE,))[0]) for scene in scenes]


def _train(server: ComfyServer, workflow: Mapping[str, dict], kind: str) -> str:
    """Queues the workflow without its pictures; the LoRA's name in models/loras."""
    shown = ("PreviewImage", "SaveImage")
    graph = {number: {**node, "inputs": dict(node["inputs"])} for number, node in workflow.items()}
    graph = {number: node for number, node in graph.items() if node["class_type"] not in shown}
    if kind == "dense":
        (training,) = find_nodes(graph, "TrainLoraNode")
        graph["dense"] = _node("UNETLoader", unet_name=DENSE, weight_dtype="default")
        graph["right"] = _node("BonsaiRightGradients", model=["dense", 0])
        graph[training]["inputs"]["model"] = ["right", 0]
    (saving,) = find_nodes(graph, "SaveLoRA")
    written, name = server.base_directory / "output" / "trained", f"night-{kind}.safetensors"
    shutil.rmtree(written, ignore_errors=True)
    graph[saving]["inputs"]["prefix"] = f"trained/{kind}"
    server.wait(server.queue(graph), SECONDS)
    (file,) = written.glob("*.safetensors")
    target = server.base_directory / "models" / "loras" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    return name


def _shares(server: ComfyServer, kind: str, lora: str | None) -> dict[str, float]:
    """Share of night skies, and of pictures in which each of the other attributes is what the prompt says."""
    cases = held_out(PROMPTS)
    seen = [judge(picture) for picture in _draw(server, kind, lora, [prompt for _, prompt in cases])]
    right = {"skies": sum(found[ATTRIBUTE] == VALUE for found in seen)}
    for name in JUDGED:
        if name != ATTRIBUTE:
            pairs = zip(seen, cases, strict=True)
            right[name] = sum(found[name] == getattr(scene, name) for found, (scene, _) in pairs)
    return {name: count / len(cases) for name, count in right.items()}


def _draw(server: ComfyServer, kind: str, lora: str | None, prompts: Sequence[str]) -> list[np.ndarray]:
    """A picture of each prompt, uint8 [SIDE, SIDE, 3], with one seed each."""
    graph = {
        "pack": _node("LoadBonsaiPack", pack_name=PACK.name, compute_dtype="auto", memory="auto"),
        "dense": _node("UNETLoader", unet_name=DENSE, weight_dtype="default"),
        "size": _node("EmptyFlux2LatentImage", width=SIDE, height=SIDE, batch_size=1),
    }
    model = ["dense" if kind == "dense" else "pack", 0]
    if lora is not None:
        graph["lora"] = _node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
        model = ["lora", 0]
    for i, prompt in enumerate(prompts):
        graph[f"text{i}"] = _node("CLIPTextEncode", clip=["pack", 1], text=prompt)
        sampling = {"model": model, "positive": [f"text{i}", 0], "latent": ["size", 0]}
        graph[f"sample{i}"] = _node("BonsaiSampler", **sampling, seed=1000 + i, steps=4, denoise=1.0)
        graph[f"decode{i}"] = _node("VAEDecode", samples=[f"sample{i}", 0], vae=["pack", 2])
        graph[f"save{i}"] = _node("SaveImage", images=[f"decode{i}", 0], filename_prefix=f"night/{kind}-{i}")
    outputs = server.wait(server.queue(graph), SECONDS)["outputs"]
    pictures = []
    for i in range(len(prompts)):
        (image,) = outputs[f"save{i}"]["images"]
        with Image.open(server.base_directory / "output" / image["subfolder"] / image["filename"]) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return pictures


def _node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}
