"""`python -m bonsai_ops.demo`: a real ComfyUI, this plugin, four prompts on the CPU, one picture of the four.

The model is the seedling that ships with the project. Standard library only: the private environment does the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .tools.environment import PLUGIN, ensure_or_exit, home, link_plugin
from .tools.server import ComfyServer
from .tools.workflow import find_nodes, to_api

WORKFLOW = PLUGIN / "workflows" / "Bonsai 01 - First run, no download.json"
PROMPTS = (
    "one orange bonsai in a black pot, mist, fallen leaves",
    "two green bonsai trees in blue pots, summer, blue sky",
    "at sunset, a red bonsai tree in a terracotta bowl, grass on the table",
    "a starry night, three little trees with golden foliage in blue pots, snowy",
)
REPEATED = ("CLIPTextEncode", "BonsaiSampler", "VAEDecode")
"""The nodes that each prompt has for itself."""


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bonsai_ops.demo", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running and print its address")
    parser.add_argument("--comfyui", type=Path, help="use this ComfyUI folder and its Python; nothing is installed")
    parser.add_argument("--prompt", action="append", help="draw this instead; may be given up to four times")
    parser.add_argument("--seed", type=int, help="instead of the seed of the workflow")
    parser.add_argument("--port", type=int, default=0, help="port of the server, 0 for any free one")
    arguments = parser.parse_args(argv)
    prompts = arguments.prompt or PROMPTS
    if len(prompts) > len(PROMPTS):
        parser.error(f"--prompt was given {len(prompts)} times, {len(PROMPTS)} are possible")
    environment = ensure_or_exit(comfyui=arguments.comfyui)
    base = home() / "demo"
    link_plugin(base)
    print("Starting ComfyUI on the CPU ...", flush=True)
    server = ComfyServer(environment.python, environment.comfyui, base, port=arguments.port)
    try:
        with server:
            workflow = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
            entry, seconds = _draw(server, several(workflow, prompts, arguments.seed))
            print(f"{len(prompts)} drawings of 4 steps in {seconds:.1f} s with loading.")
            picture = server.images(entry)[0]
            _, seconds = _draw(server, several(workflow, [f"{prompts[0]}."], arguments.seed))
            print(f"One more, now that all is loaded: {seconds:.1f} s from the text to the PNG.")
            print(f"Picture: {picture}", flush=True)
            if arguments.serve:
                print(f"Models of your own go into {base / 'models'}")
                print(f"ComfyUI is running at {server.url} - press Ctrl-C to stop it.", flush=True)
                while True:
                    time.sleep(1)
    except KeyboardInterrupt:
        print("Stopped.")
    except RuntimeError as error:
        print(f"{error}\nThe server's log: {server.log}", file=sys.stderr)
        return 1
    return 0


def several(graph: Mapping[str, dict], prompts: Sequence[str], seed: int | None = None) -> dict[str, dict]:
    """The API graph of a text-to-image workflow for several prompts; saves one picture of all: a row, or two of two."""
    (saving,) = find_nodes(graph, "SaveImage")
    repeated = {number for kind in REPEATED for number in find_nodes(graph, kind)}
    built = {number: dict(node) for number, node in graph.items() if number not in repeated}
    pictures = []
    for i, prompt in enumerate(prompts):
        for number in repeated:
            node = {**graph[number], "inputs": dict(graph[number]["inputs"])}
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in repeated:
                    node["inputs"][name] = [f"{value[0]}.{i}", value[1]]
            if node["class_type"] == "CLIPTextEncode":
                node["inputs"]["text"] = prompt
            if node["class_type"] == "BonsaiSampler" and seed is not None:
                node["inputs"]["seed"] = seed
            built[f"{number}.{i}"] = node
        source, output = graph[saving]["inputs"]["images"]
        pictures.append([f"{source}.{i}", output])
    across = len(pictures) if len(pictures) < 4 else 2
    rows = [_joined(built, pictures[i : i + across], "right") for i in range(0, len(pictures), across)]
    built[saving]["inputs"] = {**built[saving]["inputs"], "images": _joined(built, rows, "down")}
    return built


def _joined(graph: dict[str, dict], pictures: Sequence[list], direction: str) -> list:
    """The output at which all pictures stand beside each other; the nodes that join them are added."""
    joined, *others = pictures
    for other in others:
        number = f"join {len(graph)}"
        inputs = {
            "image1": joined,
            "image2": other,
            "direction": direction,
            "match_image_size": True,
            "spacing_width": 0,
            "spacing_color": "white",
        }
        graph[number] = {"class_type": "ImageStitch", "inputs": inputs}
        joined = [number, 0]
    return joined


def _draw(server: ComfyServer, graph: Mapping[str, dict]) -> tuple[dict, float]:
    """(what the history says about a graph, seconds that it took)."""
    started = time.perf_counter()
    entry = server.wait(server.queue(graph), on_progress=_show)
    return entry, time.perf_counter() - started


def _show(seconds: float, state: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{state:20} {seconds:5.1f} s", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
