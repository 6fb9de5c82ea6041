"""The beginning of every child: ComfyUI on the path with its options set, and the clocks and peaks of its device."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ..machine import peak_rss, reset_peak_rss


def start(argv: list[str]) -> dict:
    """Puts ComfyUI on the path with its options set; returns the child's options. Before anything imports comfy."""
    options = json.loads(argv[0])
    torch.set_num_threads(options["threads"])
    sys.path.insert(0, str(options["comfyui"]))
    sys.argv = ["main.py", *(["--cpu"] if options.get("device", "cpu") == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    return options


def in_worker(function: Callable[[dict], int], options: dict) -> int:
    """function(options) in a thread of its own, as ComfyUI's server runs a prompt: glibc serves it from other heaps."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, options).result()


def synchronise(device: str) -> None:
    """Waits until the device has done what was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Peak memory of this process: resident set on the CPU, allocated memory on the GPU."""
    if device == "cpu":
        return peak_rss()
    return torch.cuda.max_memory_allocated()


def reset_peak(device: str) -> None:
    """Lets peak_bytes count from what is in memory now on, where the system can."""
    if device == "cpu":
        reset_peak_rss()
    else:
        torch.cuda.reset_peak_memory_stats()
