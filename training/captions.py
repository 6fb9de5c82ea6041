"""A scene in words: synonyms, free order, things left out."""

from __future__ import annotations

import random
from collections.abc import Collection

from .scene import Scene

NUMBERS = {1: ("a", "one", "a single"), 2: ("two", "a pair of", "2"), 3: ("three", "3")}
TREES = {
    False: ("bonsai", "bonsai tree", "little tree", "miniature tree"),
    True: ("bonsai", "bonsai trees", "little trees", "miniature trees"),
}
POT_WORDS = {
    "blue": ("blue", "cobalt blue"),
    "white": ("white", "porcelain white"),
    "black": ("black", "dark black"),
    "terracotta": ("terracotta", "red clay", "terra cotta"),
    "green": ("green", "teal green", "celadon green"),
    "yellow": ("yellow", "golden yellow"),
}
LEAF_WORDS = {
    "green": ("green", "fresh green"),
    "yellow": ("yellow", "golden"),
    "orange": ("orange", "copper orange"),
    "red": ("red", "crimson"),
    "pink": ("pink", "rose pink"),
}
POT_NOUNS = {
    "tray": ("tray", "flat pot", "shallow pot"),
    "bowl": ("bowl", "round pot"),
    "tall": ("tall pot", "deep pot"),
}
LEAF_NOUNS = ("leaves", "foliage")
BACKGROUND_PHRASES = {
    "cream": ("cream background", "plain cream wall", "a warm white background", "plain background"),
    "blue": ("blue sky", "a clear day", "clouds in a blue sky", "daylight"),
    "sunset": ("sunset", "a purple and orange sunset", "evening light", "dusk"),
    "night": ("night", "a starry night", "moonlight", "night sky with a moon"),
    "grey": ("grey sky", "mist", "a grey misty day", "overcast sky"),
}
SEASON_PHRASES = {
    "spring": ("spring", "in blossom", "with white blossoms", "with spring flowers", "springtime"),
    "summer": ("summer", "with grass", "grass on the table", "summertime"),
    "autumn": ("autumn", "fallen leaves on the table", "fall", "with fallen leaves"),
    "winter": ("winter", "covered in snow", "with snow", "snowy"),
}
LEAN_PHRASES = {
    "upright": ("upright", "formal upright"),
    "left": ("leaning left", "leaning to the left"),
    "right": ("leaning right", "leaning to the right"),
}
STYLES = ("illustration", "drawing", "picture", "flat illustration", "beautiful", "detailed", "")
FRAMES = ("", "", "", "a picture of ", "a drawing of ", "an illustration of ", "photo of ")


def caption(scene: Scene, rng: random.Random, omit: float = 0.08, silent: Collection[str] = ()) -> tuple[str, set[str]]:
    """(a prompt for `scene`, the judged attributes that it names).

    Each attribute but the count is left out with chance `omit`, those in `silent` always.
    """
    named = {name for name in ("pot", "foliage", "background", "season") if rng.random() >= omit} - set(silent)
    named.add("count")
    pick = rng.choice
    many = scene.count > 1
    leaf = pick(LEAF_WORDS[scene.foliage])
    tree = pick(TREES[many])
    if pick((True, False)) or "foliage" not in named:
        noun, tail = tree, [f"with {leaf} {pick(LEAF_NOUNS)}"] if "foliage" in named else []
    else:
        noun, tail = f"{leaf} {tree}", []
    pot_noun = pick(("pot", "pot", *POT_NOUNS[scene.shape]))
    plural = {"tray": "trays", "bowl": "bowls"}.get(pot_noun, pot_noun + "s")
    if "pot" in named:
        colour = pick(POT_WORDS[scene.pot])
        tail.append(f"in {colour} {plural}" if many else f"in a {colour} {pot_noun}")
    rng.shuffle(tail)
    subject = " ".join([pick(NUMBERS[scene.count]), noun, *tail])
    extras = []
    if "background" in named:
        phrase = pick(BACKGROUND_PHRASES[scene.background])
        extras.append(f"at {phrase}" if phrase in ("sunset", "night", "dusk") and pick((True, False)) else phrase)
    if "season" in named:
        phrase = pick(SEASON_PHRASES[scene.season])
        extras.append(f"in {phrase}" if phrase in SEASON_PHRASES and pick((True, False)) else phrase)
    if rng.random() < 0.75:
        extras.append(pick(LEAN_PHRASES[scene.lean]))
    if rng.random() < 0.2:
        extras.append(pick(STYLES))
    rng.shuffle(extras)
    parts = [pick(FRAMES) + subject, *(e for e in extras if e)]
    if rng.random() < 0.3:
        rng.shuffle(parts)
    text = pick((", ", ", ", ", ", " ")).join(parts)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + pick(
        ("", "", "."),
    ), named
