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
    from .. import synthetic

    pack, dense = folder / "ternary" / "mlx.safetensors", folder / "dense.safetensors"
    if not pack.is_file():
        synthetic.write_mlx(pack, "ternary")
    if not dense.is_file():
        synthetic.write_dense(dense)
    figures: dict = {"size": size}
    for way in WAYS:
        file = pack if way == "ours" else dense
        command = [sys.executable, "-m", "bonsai_ops.bench.run_step", str(comfyui), way, str(file), str(size)]
        done = subprocess.run(command, cwd=PLUGIN, env=clean_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
        row = json.loads(done.stdout.strip().splitlines()[-1])
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
