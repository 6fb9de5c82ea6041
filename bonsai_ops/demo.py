"""`python -m bonsai_ops.demo`: a real ComfyUI, this plugin, one text-to-image workflow on the CPU, one picture.

Standard library only until the private environment exists. No trained weights ship with the project yet, so the demo
writes a tiny pack with random weights: it shows that every part runs, its picture is noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from .environment import PLUGIN, clean_environment, ensure_or_exit, home, link_plugin, run_attached
from .server import ComfyServer
from .workflow import find_nodes, to_api

WORKFLOW = PLUGIN / "workflows" / "bonsai_text_to_image_pack.json"
PACK = "tiny-random"
SIZE = 256


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bonsai_ops.demo", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running and print its address")
    parser.add_argument("--comfyui", type=Path, help="use this ComfyUI folder and its Python; nothing is installed")
    parser.add_argument("--prompt", default="a bonsai tree in a blue pot, morning light")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=0, help="port of the server, 0 for any free one")
    parser.add_argument("--write-pack", type=Path, help=argparse.SUPPRESS)  # what the demo calls in its environment
    arguments = parser.parse_args(argv)
    if arguments.write_pack:
        from .synthetic import write_pipeline

        write_pipeline(arguments.write_pack)
        return 0
    environment = ensure_or_exit(comfyui=arguments.comfyui)
    base = home() / "demo"
    link_plugin(base)
    pack = base / "models" / "bonsai" / PACK
    if not (pack / "vae" / "config.json").is_file():
        print(
            "Writing a tiny pack with random weights (its picture is noise; a trained one is to come) ...", flush=True
        )
        command = [str(environment.python), "-m", "bonsai_ops.demo", "--write-pack", str(pack)]
        code = run_attached(command, env=clean_environment(), cwd=PLUGIN)
        if code:
            return code
    print("Starting ComfyUI on the CPU ...", flush=True)
    server = ComfyServer(environment.python, environment.comfyui, base, port=arguments.port)
    try:
        with server:
            picture, seconds = _draw(server, arguments.prompt, arguments.seed)
            print(f"Picture ({SIZE}x{SIZE}, 4 steps, {seconds:.1f} s with loading): {picture}", flush=True)
            if arguments.serve:
                print(f"ComfyUI is running at {server.url} - press Ctrl-C to stop it.", flush=True)
                while True:
                    time.sleep(1)
    except KeyboardInterrupt:
        print("Stopped.")
    except RuntimeError as error:
        print(f"{error}\nThe server's log: {server.log}", file=sys.stderr)
        return 1
    return 0


def _draw(server: ComfyServer, prompt: str, seed: int) -> tuple[Path, float]:
    """Queues the shipped workflow with the demo's pack; (path of the picture, seconds)."""
    graph = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    changes = {
        "LoadBonsaiPack": {"pack_name": PACK},
        "CLIPTextEncode": {"text": prompt},
        "EmptyFlux2LatentImage": {"width": SIZE, "height": SIZE},
        "BonsaiSampler": {"seed": seed},
        "SaveImage": {"filename_prefix": "bonsai-demo"},
    }
    for kind, inputs in changes.items():
        for number in find_nodes(graph, kind):
            graph[number]["inputs"].update(inputs)
    started = time.perf_counter()
    entry = server.wait(server.queue(graph), on_progress=_show)
    return server.images(entry)[0], time.perf_counter() - started


def _show(seconds: float, state: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{state:20} {seconds:5.1f} s", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
