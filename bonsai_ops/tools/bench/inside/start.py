"""The beginning of every child: its options, and the clock of its device."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def start(argv: list[str]) -> dict:
    """The child's options; sets torch's threads. __main__.py has set ComfyUI up before."""
    options = json.loads(argv[0])
    torch.set_num_threads(options["threads"])
    return options


def in_worker(function: Callable[[dict], int], options: dict) -> int:
    """function(options) in a thread of its own, as ComfyUI's server runs a prompt: glibc serves it from other heaps."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, options).result()


def synchronise(device: str) -> None:
    """Waits until the device has done what was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()
