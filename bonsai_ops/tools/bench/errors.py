"""How far our pictures are from one that is computed in fp32 throughout: relative errors of what is kept on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from .report import show_table
from .ways import PROGRAMS

REFERENCE = "ours_fp32"
STATES = {"text": "text states", "velocity": "velocity of the first step", "latent": "last latent"}
"""What a picture keeps, and how it is called."""


def kept(folder: Path, name: str) -> Path:
    """The file of a program's states."""
    return folder / f"{name}.safetensors"


def measure(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Prints the table and returns {name of a program: {state: |x - truth| / |truth|}} of those that kept states.

    The truth is that of REFERENCE; one line and {} without it. All draw from the same noise, so velocities of the first
    step are of the same point.
    """
    if not kept(folder, REFERENCE).is_file():
        print("no relative errors: there is no picture in fp32 to compare with")
        return {}
    truth, found = load_file(kept(folder, REFERENCE)), {}
    for name in names:
        if name != REFERENCE and kept(folder, name).is_file():
            states = load_file(kept(folder, name))
            found[name] = {s: float((states[s] - truth[s]).norm() / truth[s].norm()) for s in STATES}
    labels = {way.name: way.label for way in PROGRAMS}
    print("relative errors beside fp32 throughout")
    show_table(("way", *STATES.values()), [(labels[name], *(row[s] for s in STATES)) for name, row in found.items()])
    return found
