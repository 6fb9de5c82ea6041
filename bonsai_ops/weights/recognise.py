"""Says what a file is when it is not the FLUX.2 transformer that was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .errors import PackError

KINDS = (
    (("cap_embedder.", "noise_refiner."), "is a Lumina or Z-Image model", 'Load it with "Load Diffusion Model".'),
    (
        ("model.layers.", "layers.", "language_model.", "qwen3_4b."),
        "is a language model (a text encoder)",
        'Load it with "Load Bonsai Text Encoder" or CLIPLoader.',
    ),
    (
        ("encoder.down_blocks.", "decoder.up_blocks.", "encoder.down.", "decoder.up."),
        "is a VAE",
        'Load it with "Load VAE".',
    ),
    (
        ("time_text_embed.", "vector_in."),
        "is a FLUX.1 model",
        'Bonsai packs are FLUX.2: load FLUX.1 with "Load Diffusion Model".',
    ),
    (
        ("model.diffusion_model.", "first_stage_model.", "conditioner."),
        "is a checkpoint of another architecture",
        'Load it with "Load Checkpoint".',
    ),
    (
        ("img_in.", "transformer_blocks.", "double_blocks.", "joint_blocks.", "blocks."),
        "is a diffusion transformer, but not of the FLUX.2 family",
        'Load it with "Load Diffusion Model".',
    ),
)


def foreign_model(path: Path, names: Iterable[str], missing: str) -> PackError:
    """The error for a file without the key `missing`: what its keys look like and which node loads it."""
    names = list(names)
    adapter = next((n for n in names if "lora_" in n), None)
    if adapter is not None:
        return PackError(path, f"is a LoRA: it has {adapter}", 'Load it with "LoraLoaderModelOnly" behind the model.')
    for prefixes, found, cure in KINDS:
        key = next((n for n in names if n.startswith(prefixes)), None)
        if key is not None:
            return PackError(path, f"{found}: it has {key} and no {missing}", cure)
    sample = ", ".join(sorted(names)[:3]) or "no tensors"
    return PackError(
        path, f"is not a FLUX.2 transformer: it has {sample} and no {missing}", "Give the transformer of a Bonsai pack."
    )
