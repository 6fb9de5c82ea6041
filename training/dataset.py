"""The drawings as arrays on disk: one .npy a size, uint8 [count, height, width, 3], and the scenes beside it."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import numpy as np

from .drawing import draw
from .scene import Scene, random_scene

SIZES = {(128, 128): 14000, (192, 128): 9000, (128, 192): 5000, (256, 256): 9000}
"""{(width, height): drawings to train on}."""


def path_of(work: Path, width: int, height: int) -> Path:
    return work / f"drawings-{width}x{height}.npy"


def make(work: Path, processes: int = 2, share: float = 1.0) -> None:
    """Draws the sizes that are missing, this share of each: a short training needs few."""
    for (width, height), count in SIZES.items():
        path = path_of(work, width, height)
        if path.is_file():
            continue
        rng = random.Random(f"{width}x{height}")
        count = max(1, round(share * count))
        scenes = [random_scene(rng) for _ in range(count)]
        part = path.with_suffix(".part.npy")
        array = np.lib.format.open_memmap(part, "w+", np.uint8, (count, height, width, 3))
        with multiprocessing.Pool(processes) as pool:
            jobs = [(scene, width, height) for scene in scenes]
            for i, picture in enumerate(pool.imap(_draw, jobs, chunksize=64)):
                array[i] = picture
        array.flush()
        path.with_suffix(".json").write_text(json.dumps([s.as_dict() for s in scenes]), encoding="utf-8")
        part.replace(path)
        print(f"{count} drawings of {width}x{height}", flush=True)


def load(work: Path, width: int, height: int) -> tuple[np.ndarray, list[Scene]]:
    """(pictures as a memory map, their scenes)."""
    path = path_of(work, width, height)
    records = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return np.load(path, mmap_mode="r"), [Scene(**record) for record in records]


def _draw(job: tuple[Scene, int, int]) -> np.ndarray:
    return np.asarray(draw(*job))
