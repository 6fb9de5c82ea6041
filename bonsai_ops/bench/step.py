"""One sampling step of the 4B model in the real host, each way in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ..environment import PLUGIN, clean_environment
from .report import show_table

WAYS = {
    "ours": "ternary pack, packed in memory",
    "dense_bf16": "dense model computing in bf16",
    "stock": "stock ComfyUI, dense file",
}


def measure(comfyui: Path, folder: Path, size: int) -> dict:
    """Prints the table and returns {"size", "ours_s", "dense_bf16_s", "stock_s", "<way>_bytes", "<way>_peak_rss"}."""
    figures: dict = {"size": size}
    for way in WAYS:
        row = _run(comfyui, folder, way, size, 0)
        figures |= {f"{way}_s": row["seconds"], f"{way}_bytes": row["bytes"], f"{way}_peak_rss": row["peak_rss"]}
    print(f"one step of the 4B model at {size}x{size}")
    show_table(
        ("way", "seconds", "of stock", "of dense bf16", "weights MB", "peak MB"),
        [
            (
                WAYS[way],
                figures[f"{way}_s"],
                figures[f"{way}_s"] / figures["stock_s"],
                figures[f"{way}_s"] / figures["dense_bf16_s"],
                figures[f"{way}_bytes"] / 1e6,
                figures[f"{way}_peak_rss"] / 1e6,
            )
            for way in WAYS
        ],
    )
    return figures


def measure_lora(comfyui: Path, folder: Path, size: int, rank: int) -> dict:
    """Prints what a LoRA on every linear layer costs a step, ours and dense; returns the seconds and ratios."""
    figures: dict = {"size": size, "rank": rank}
    rows = []
    for way in ("ours", "dense_bf16"):
        row = _run(comfyui, folder, way, size, rank)
        cost = row["lora_seconds"] / row["seconds"]
        figures |= {f"{way}_s": row["seconds"], f"{way}_lora_s": row["lora_seconds"], f"{way}_cost": cost}
        rows.append((WAYS[way], row["seconds"], row["lora_seconds"], cost))
    print(f"a rank {rank} LoRA on every linear layer of the 4B model at {size}x{size}, seconds a step")
    show_table(("way", "without", "with", "cost"), rows)
    return figures


def _run(comfyui: Path, folder: Path, way: str, size: int, rank: int) -> dict:
    """One way in a fresh process, its pack written first if it is not there; its figures."""
    from .. import synthetic

    file = folder / "ternary" / "mlx.safetensors" if way == "ours" else folder / "dense.safetensors"
    if not file.is_file():
        if way == "ours":
            synthetic.write_mlx(file, "ternary")
        else:
            synthetic.write_dense(file)
    command = [sys.executable, "-m", "bonsai_ops.bench.run_step", str(comfyui), way, str(file), str(size), str(rank)]
    done = subprocess.run(command, cwd=PLUGIN, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
