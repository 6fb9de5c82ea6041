"""A graph drawn by several ComfyUI servers at once, spread by ComfyUI-Distributed:
python -m machines.over_distributed GRAPH.json --server http://127.0.0.1:8188.

GRAPH.json is in API format, as docs/scripting.md exports it. Its seeds and its pictures are led through the two nodes
of ComfyUI-Distributed, and the server that has that plugin gives the graph to the workers of its settings: each draws
the graph with a seed of its own, this server with the graph's own, its first worker with the next one, and so on. All
pictures are saved by this server. docs/machines.md says what has to lie on each machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEEDS = ("seed", "noise_seed")
"""Inputs that a sampler or a noise has its seed at."""


def spread(graph: Mapping[str, dict]) -> dict[str, dict]:
    """The graph with Distributed Seed at each seed and Distributed Collector before each Save Image.

    Raises ValueError for a graph that has no seed of its own or saves no picture.
    """
    made = {number: {**node, "inputs": dict(node["inputs"])} for number, node in graph.items()}
    free = max((int(number) for number in graph if number.isdecimal()), default=0)
    seeds = [(node, name) for node in made.values() for name in SEEDS if isinstance(node["inputs"].get(name), int)]
    saving = [node for node in made.values() if node["class_type"] == "SaveImage"]
    if not seeds:
        raise ValueError("no node of the graph has a number as its seed: give the sampler one")
    if not saving:
        raise ValueError("the graph saves no picture: add Save Image")
    for node, name in seeds:
        free += 1
        made[str(free)] = {"class_type": "DistributedSeed", "inputs": {"seed": node["inputs"][name]}}
        node["inputs"][name] = [str(free), 0]
    for node in saving:
        free += 1
        inputs = {"images": node["inputs"]["images"], "load_balance": False}
        made[str(free)] = {"class_type": "DistributedCollector", "inputs": inputs}
        node["inputs"]["images"] = [str(free), 0]
    return made


def ask(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """What the server answers to GET, or to POST where there is a body. Raises RuntimeError with what it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # A proxy that the environment names is not for machines of one's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise RuntimeError(f"{url} does not answer: {error}") from None


def draw(graph: Mapping[str, dict], server: str, workers: Sequence[str], timeout: float) -> list[str]:
    """Queues the graph and waits; returns the names of the saved pictures. Raises RuntimeError."""
    body = {"prompt": spread(graph), "client_id": "bonsai-example", "enabled_worker_ids": list(workers)}
    queued = ask(f"{server}/distributed/queue", body)
    print(f"{queued['worker_count']} of {len(workers)} workers answer.", flush=True)
    end = time.monotonic() + timeout
    while not (history := ask(f"{server}/history/{queued['prompt_id']}")):
        if time.monotonic() > end:
            raise RuntimeError(f"{server} did not draw it within {timeout:.0f} s")
        time.sleep(0.5)
    entry = history[queued["prompt_id"]]
    if entry["status"]["status_str"] != "success":
        raise RuntimeError(f"the run failed: {entry['status']['messages'][-1]}")
    images = [image for output in entry["outputs"].values() for image in output.get("images", ())]
    return [image["filename"] for image in images if image["type"] == "output"]


def main(argv: Sequence[str] | None = None) -> int:
    """Draws; returns the exit code: 1 also if a worker's picture is missing."""
    parser = argparse.ArgumentParser(prog="python -m machines.over_distributed", description=__doc__.split("\n\n")[0])
    parser.add_argument("graph", type=Path, help="a file in API format")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="the one with ComfyUI-Distributed's settings")
    parser.add_argument("--workers", nargs="*", help="ids of the workers (those that its settings enable)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for the pictures (600)")
    arguments = parser.parse_args(argv)
    try:
        workers = arguments.workers
        if workers is None:
            known = ask(f"{arguments.server}/distributed/config")["workers"]
            workers = [str(worker["id"]) for worker in known if worker.get("enabled")]
        graph = json.loads(arguments.graph.read_text(encoding="utf-8"))
        pictures = draw(graph, arguments.server, workers, arguments.timeout)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(pictures))
    missing = len(workers) + 1 - len(pictures)
    if missing > 0:
        print(f"{missing} pictures are missing: a worker did not answer, or ended.", file=sys.stderr)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
