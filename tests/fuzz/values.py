"""Values that are none of those expected, and JSON in which some stand."""

from __future__ import annotations

import json
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 16, 31, 64, 127, 255, 256, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
NUMBERS += ((1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, -(1 << 63))
FLOATS = (0.0, -0.0, 0.5, 1e300, -1e300, 5e-324, 1e9)
TEXTS = (
    "",
    " ",
    "a",
    "\0",
    "\n\x1b[2J",
    "../../etc/passwd",
    "/dev/zero",
    "\u202e",
    "a" * 3000,
    "\ud800",
    "NaN",
    "None",
)
TEXTS += ("F64", "BF16", "U8", "F8_E4M3", "I4", "hadamard", "weight", "double_blocks.999999999.img_attn.qkv.weight")
RAW = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[" * 2000, b'{"a":' * 300, b"1" * 5000, b"\xff\xfe", b"", b"nul")


def number(rng: Random) -> int:
    return rng.choice(NUMBERS) + rng.choice((0, 0, 0, 1, -1))


def hostile(rng: Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kind = rng.randrange(9)
    if kind < 3:
        return number(rng)
    if kind == 3:
        return rng.choice(FLOATS)
    if kind == 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice((None, True, False))
    if depth > 2:
        return [] if kind == 6 else {}
    if kind == 6:
        return [hostile(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind == 7:
        return {rng.choice(TEXTS): hostile(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))}
    return [hostile(rng, 3)] * rng.choice((70, 3000))


def changed(tree: Any, rng: Random) -> Any:
    """A copy of a JSON value with one place in it replaced, left out, doubled, renamed or moved."""
    places = list(_places(tree, ()))
    if not places:
        return hostile(rng)
    # a header has thousands of places, most of them in its tensors: every depth gets its turn
    depth = rng.choice(sorted({len(place) for place in places}))
    place = rng.choice([place for place in places if len(place) == depth])
    tree = json.loads(json.dumps(tree))
    outer = tree
    for step in place[:-1]:
        outer = outer[step]
    last = place[-1]
    action = rng.randrange(6)
    if action == 0:
        del outer[last]
    elif action == 1 and isinstance(outer, dict):
        outer[rng.choice((*TEXTS, last + "x", last[:-1], last.upper()))] = outer.pop(last)
    elif action == 1 or action == 2:
        other = rng.choice([p for p in places if len(p) == len(place)])
        value: Any = tree
        for step in other:
            value = value[step] if isinstance(value, (dict, list)) and _has(value, step) else value
        outer[last] = json.loads(json.dumps(value))
    elif action == 3 and isinstance(outer[last], (int, float)):
        outer[last] = outer[last] * rng.choice((2, 4, 0.5, -1, 1 << 20)) + rng.choice((0, 1, -1))
    elif action == 3 and isinstance(outer[last], list):
        outer[last] = rng.choice((outer[last][::-1], outer[last] + outer[last], outer[last][:-1], [*outer[last], 1]))
    else:
        outer[last] = hostile(rng)
    return tree


def spelled(tree: Any, rng: Random) -> bytes:
    """JSON of it, at times with an entry twice or something in it that is none."""
    raw = json.dumps(tree).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice(RAW) + raw[at:]
    elif rng.random() < 0.05 and isinstance(tree, dict) and tree:
        again = rng.choice(list(tree))
        raw = raw[:-1] + b", " + json.dumps({again: hostile(rng)}).encode("utf-8", "surrogatepass")[1:]
    return raw


def _has(outer: dict | list, step: Any) -> bool:
    return step in outer if isinstance(outer, dict) else isinstance(step, int) and step < len(outer)


def _places(tree: Any, place: tuple) -> Any:
    if isinstance(tree, dict):
        pairs: Any = tree.items()
    elif isinstance(tree, list):
        pairs = enumerate(tree)
    else:
        return
    for key, value in pairs:
        yield (*place, key)
        yield from _places(value, (*place, key))
