"""Makes the seedling: python -m training [--work FOLDER] [--stage NAME] [--minutes M].

Stages, in order; each goes on where it stopped, and all but unpack, figures and badge run if none is named:

    unpack        checkpoints from the shipped files, to go on from them instead of from the beginning
    drawings      pictures and captions, drawn by code
    vae           the autoencoder
    latents       every drawing through it
    text          the text encoder
    ternary       the transformer with three-level weights
    decoder       more training for the VAE's decoder; may run beside the transformer
    binary        the transformer with two levels
    dense         the ternary one's masters trained on without rounding, for comparison
    lora          a small LoRA for the ternary one
    pack          the files that ship
    measure       prompt following and reconstruction of what is there
    quantize      what post-training quantization does to the dense one
    fidelity      how close packed twins of the dense one come, by size and by way of making them
    other         the same for a small random model of another architecture; needs no other stage
    node          the same for the nodes Patch to BitLinear and Recover BitLinear on the dense one, with their defaults
    gradients     those of Train LoRA on the dense one and small random models, stock and right, against the true ones
    modes         what bf16 and 8-bit activations change in the pictures of the one that ships; needs no other stage
    figures       docs/results, the curves and the tables of docs from what these five found
    badge         icon and banner for the ComfyUI registry, drawn by the seedling that ships
    night         what the shipped workflow trains on the packed one and on a dense one; needs no other stage

Runs for hours on two processor cores, in the environment of the tests. Everything is kept in the work folder.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bonsai_ops.tools.environment import PLUGIN, clean_environment, ensure_or_exit, home, run_attached

STEPS = {"ternary": 2900, "binary": 2800, "dense": 300}
MODELS = PLUGIN / "bonsai_ops" / "models"
OPTIONAL = ("unpack", "figures", "badge")
_INSIDE = "BONSAI_TRAINING"


def main(argv: list[str]) -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for drawings and checkpoints (4 GB)")
    parser.add_argument("--stage", action="append", help="run this stage only; may be given several times")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop each training stage after this time")
    parser.add_argument("--drawings", type=float, default=1.0, help="share of the drawings to make; 0.3 do for `dense`")
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder that the stage `pack` fills")
    arguments = parser.parse_args(argv)
    environment = ensure_or_exit(tests=True)
    if not os.environ.get(_INSIDE):
        variables = clean_environment({_INSIDE: "1", "BONSAI_HOME": str(home()), "PYTHONPATH": str(PLUGIN)})
        return run_attached([str(environment.python), "-m", "training", *argv], env=variables, cwd=PLUGIN)
    work = arguments.work or home() / "training"
    work.mkdir(parents=True, exist_ok=True)
    stages = _stages(work, environment.comfyui, arguments)
    unknown = set(arguments.stage or ()) - set(stages)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; expected one of {', '.join(stages)}")
    for name in arguments.stage or [name for name in stages if name not in OPTIONAL]:
        print(f"{name} ...", flush=True)
        if stages[name]() is False:
            print(f"{name} is not finished: run the same command again to go on.")
            return 0
    return 0


def _stages(work: Path, comfyui: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """{name: function}; a function returns False when its time was over before its work."""
    import torch

    from . import (
        badge,
        dataset,
        export,
        fidelity,
        figures,
        gradients,
        lora,
        measure,
        modes,
        night,
        node,
        other,
        quantizer,
        text_encoder,
        transformer,
        unpack,
    )
    from . import vae as autoencoder

    seconds, target = 60 * arguments.minutes, arguments.models
    torch.set_flush_denormal(True)  # Muon's iterations underflow on gradients of low rank

    def train(scheme: str, start: str | None = None) -> Callable[[], bool]:
        first = None if start is None else work / f"{start}.pt"
        return lambda: transformer.train(work, comfyui, scheme, STEPS[scheme], seconds, first)

    return {
        "unpack": lambda: unpack.unpack(work, target),
        "drawings": lambda: dataset.make(work, share=arguments.drawings),
        "vae": lambda: autoencoder.train(work, seconds),
        "latents": lambda: autoencoder.encode_all(work),
        "text": lambda: text_encoder.train(work, comfyui, seconds),
        "ternary": train("ternary"),
        "decoder": lambda: autoencoder.train_decoder(work, seconds),
        "binary": train("binary"),
        "dense": train("dense", "ternary"),
        "lora": lambda: lora.train(work, comfyui, seconds),
        "pack": lambda: export.pack(work, comfyui, target),
        "measure": lambda: measure.show(work, comfyui),
        "quantize": lambda: quantizer.show(work, comfyui),
        "fidelity": lambda: fidelity.show(work, comfyui, seconds),
        "other": lambda: other.show(work, comfyui, seconds),
        "node": lambda: node.show(work, comfyui, seconds),
        "gradients": lambda: gradients.show(work, comfyui),
        "modes": lambda: modes.show(work, comfyui),
        "figures": lambda: figures.show(work),
        "badge": lambda: badge.make(work, comfyui),
        "night": lambda: night.show(work, comfyui),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
