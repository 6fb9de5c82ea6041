"""How well a model follows prompts: pictures of held-out combinations, read back by the judge."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np

from .captions import caption
from .judge import judge
from .scene import JUDGED, Scene, random_scene

SEEDS = (0, 1, 2)
Painter = Callable[[list[str], int, int, int], np.ndarray]
"""(prompts, width, height, seed) -> uint8 [prompts, height, width, 3]."""


def held_out(count: int) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, with prompts that name every judged attribute."""
    rng = random.Random("held out")
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, caption(scene, rng, omit=0.0)[0]) for scene in scenes]


def accuracy(paint: Painter, width: int, height: int, count: int = 32, batch: int = 8) -> dict[str, float]:
    """Share of pictures in which each attribute is right, SEEDS pictures a prompt; `all`: every attribute at once."""
    cases, right, total = held_out(count), Counter(), 0
    for seed in SEEDS:
        for i in range(0, len(cases), batch):
            part = cases[i : i + batch]
            for (scene, _), picture in zip(part, paint([p for _, p in part], width, height, seed), strict=True):
                seen, wanted = judge(picture), scene.judged()
                right.update(name for name in JUDGED if seen[name] == wanted[name])
                right["all"] += seen == wanted
                total += 1
    return {name: right[name] / total for name in (*JUDGED, "all")}
