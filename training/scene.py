"""What a drawing shows: attributes, random scenes, and the combinations that training never sees."""

from __future__ import annotations

import random
import zlib
from dataclasses import asdict, dataclass

POTS = ("blue", "white", "black", "terracotta", "green", "yellow")
FOLIAGE = ("green", "yellow", "orange", "red", "pink")
BACKGROUNDS = ("cream", "blue", "sunset", "night", "grey")
SEASONS = ("spring", "summer", "autumn", "winter")
COUNTS = (1, 2, 3)
LEANS = ("upright", "left", "right")
SHAPES = ("tray", "bowl", "tall")
JUDGED = {"pot": POTS, "foliage": FOLIAGE, "background": BACKGROUNDS, "season": SEASONS, "count": COUNTS}
"""The attributes that judge.py reads back from a picture, with their values."""
VARIANTS = 2
"""Ways in which a tree grows. What a caption leaves open is little on purpose: the official schedule jumps from sigma
0.7 to 0 in its last of 4 steps, so what is not decided by then stays a blur. With six ways red leaves blurred with snow
and blossom into pink ones."""
HELD_OUT = 12
"""One combination of the judged attributes in HELD_OUT is kept out of training."""


@dataclass(frozen=True)
class Scene:
    """One drawing. `variant` decides what a caption never says: how the trunk bends and where branches leave it."""

    pot: str
    foliage: str
    background: str
    season: str
    count: int
    lean: str
    shape: str
    variant: int

    def judged(self) -> dict[str, str | int]:
        """{attribute: value} of what the judge looks for."""
        return {name: getattr(self, name) for name in JUDGED}

    def is_held_out(self) -> bool:
        """Whether this combination of judged attributes belongs to the test set."""
        return zlib.crc32(repr(sorted(self.judged().items())).encode()) % HELD_OUT == 0

    def as_dict(self) -> dict:
        return asdict(self)


def random_scene(rng: random.Random, held_out: bool | None = False) -> Scene:
    """A scene with every attribute uniform; held_out: only such combinations, only others, or (None) any."""
    while True:
        scene = Scene(
            rng.choice(POTS),
            rng.choice(FOLIAGE),
            rng.choice(BACKGROUNDS),
            rng.choice(SEASONS),
            rng.choice(COUNTS),
            rng.choice(LEANS),
            rng.choice(SHAPES),
            rng.randrange(VARIANTS),
        )
        if held_out is None or scene.is_held_out() == held_out:
            return scene
