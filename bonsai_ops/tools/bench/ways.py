"""The ways that benchmarks measure beside one another: their names in the figures, and how they are shown and drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ... import kernels

Colour = tuple[int, int, int]
OURS, OURS_2, OURS_3, RIVAL, RIVAL_2 = (46, 125, 50), (102, 187, 106), (0, 131, 143), (120, 134, 156), (176, 186, 201)


@dataclass(frozen=True)
class Way:
    """One way to do the work. name: in the figures' keys, such as <name>_s. label: in drawings. ours: the plugin's."""

    name: str
    label: str
    colour: Colour
    ours: bool = False


@dataclass(frozen=True)
class StepWay(Way):
    """One way to do a step in the real host. text: in the table. model: ours, dense_bf16 or stock (inside/step.py).

    mode: of ours. shares: name of the way whose process it measures in, with attention in parts, which only a CPU does.
    """

    text: str = ""
    model: str = "ours"
    mode: str = kernels.EXACT
    shares: str | None = None


LAYER_WAYS = (
    Way("trit5", "ternary, compact", OURS, ours=True),
    Way("planes", "ternary, 2-bit planes", OURS_2, ours=True),
    Way("bit", "1-bit", (156, 204, 101), ours=True),
    Way("nibble", "4-bit, affine", (174, 213, 129), ours=True),
    Way("byte", "8-bit, affine", (197, 225, 165), ours=True),
    Way("a8", "int8 activations", OURS_3, ours=True),
    Way("a8_fp8", "fp8 activations", (0, 172, 193), ours=True),
    Way("fp16_accumulate", "fp16 sums", (38, 166, 154), ours=True),
    Way("bf16_kept", "dense bf16, kept result", RIVAL),
    Way("unpack", "unpacked at each call", RIVAL_2),
    Way("fp32", "dense fp32", RIVAL),
    Way("gemlite", "gemlite", (141, 110, 99)),
    Way("bf16", "dense bf16", RIVAL),
)
"""Of the products, in the order in which they are drawn; bf16 is what they are compared with."""
SWEEP_WAYS = ("bf16", "trit5", "a8")

_PACK, _DENSE = "ternary pack, packed in memory", "dense model computing in bf16"
STEP_WAYS = (
    StepWay("ours", "Bonsai Image", OURS, True, _PACK),
    *(
        StepWay(f"ours_{w.name}", f"Bonsai Image, {w.label}", OURS_3, True, f"{_PACK}, mode {w.name}", mode=w.name)
        for w in LAYER_WAYS
        if w.name in kernels.MODES
    ),
    StepWay("dense_bf16", "dense, bf16", RIVAL, False, _DENSE, "dense_bf16"),
    StepWay(
        *("dense_bf16_parts", "dense, in parts", RIVAL, False, "the same, attention in parts", "dense_bf16"),
        shares="dense_bf16",
    ),
    StepWay("stock", "stock ComfyUI", RIVAL_2, False, "stock ComfyUI, dense file", "stock"),
)
PROGRAMS = (
    Way("ours", "Bonsai Image", OURS, ours=True),
    Way("ours_mlx", "Bonsai Image, MLX files", OURS, ours=True),
    Way("ours_native", "Bonsai Image, native files", OURS, ours=True),
    *(
        Way(f"ours_{way.name}", f"Bonsai Image, {way.label}", way.colour, ours=True)
        for way in LAYER_WAYS
        if way.name in kernels.MODES
    ),
    Way("ours_fp32", "Bonsai Image, fp32", OURS, ours=True),
    Way("sdcpp", "stable-diffusion.cpp", RIVAL),
    Way("unpack", "unpacked at each call", RIVAL_2),
    Way("stock", "stock ComfyUI, dense files", RIVAL_2),
    Way("ours_small", "Bonsai Image, 320x240", OURS, ours=True),
    Way("trillim", "Trillim, 320x240", RIVAL),
)
"""Of the picture. Those of another size are drawn by nobody."""


def check_modes(modes: Iterable[str]) -> None:
    """Raises SystemExit for a mode that is none."""
    for mode in modes:
        if mode not in kernels.MODES:
            raise SystemExit(f"--mode {mode} is unknown, expected some of {', '.join(kernels.MODES)}")


def named(ways: tuple[Way, ...], name: str) -> Way:
    """The way of that name. Raises KeyError."""
    return {way.name: way for way in ways}[name]
