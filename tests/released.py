"""What saved workflows may name, and so never goes: nodes, their inputs and options in order, and their outputs.

No id was ever renamed. One that must be takes a row in a table of ComfyUI's node replacements, and stays here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """inputs: {id: options, none where they are files, or ComfyUI's, or it has none}. outputs: their types."""

    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...] = field(default=())


def _inputs(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, ())


LOADING = {
    "compute_dtype": ("auto", "bf16", "fp16", "fp32"),
    "memory": ("auto", "classic"),
    "mode": ("exact", "fp16_accumulate", "a8", "a8_fp8"),
    "layout": ("compact", "fast"),
}
TEXT_DTYPES = ("auto", "bf16", "fp16", "fp32")
SAMPLING = ("positive", "negative", "latent", "seed", "steps", "cfg", "sampler_name", "scheduler")

RELEASED: dict[str, Node] = {
    "LoadBonsaiPack": Node({"pack_name": (), **LOADING, "text_compute_dtype": TEXT_DTYPES}, ("MODEL", "CLIP", "VAE")),
    "LoadBonsaiModel": Node({"model_name": (), **LOADING}, ("MODEL",)),
    "LoadBonsaiTextEncoder": Node({"text_encoder_name": (), "compute_dtype": TEXT_DTYPES}, ("CLIP",)),
    "BonsaiSampler": Node(_inputs("model", "positive", "latent", "seed", "steps", "denoise"), ("LATENT",)),
    "SaveBonsaiModel": Node(_inputs("model", "filename_prefix", "include_loras")),
    "BonsaiModelInfo": Node(_inputs("model"), ("STRING", "IMAGE")),
    "PatchToBitLinear": Node(
        {
            "model": (),
            "scheme": ("ternary", "binary", "4bit", "8bit"),
            "group_size": ("32", "64", "128", "256"),
            **_inputs("rank", "target_size_mb", "include", "exclude", "dry_run", "calibration"),
        },
        ("MODEL", "STRING", "STRING", "IMAGE"),
    ),
    "CalibrateBitLinear": Node(
        {**_inputs("model", *SAMPLING), "mode": ("power", "full")}, ("BONSAI_CALIBRATION", "LATENT")
    ),
    "MeasureBitLinear": Node(
        _inputs("original", "patched", *SAMPLING),
        ("STRING", "STRING", "IMAGE", "LATENT"),
    ),
    "RecoverBitLinear": Node(
        _inputs(
            *("original", "patched", "prompts", "latent", "sigmas", "seed"),
            *("points", "steps", "batch", "learning_rate", "minutes"),
        ),
        ("MODEL", "STRING", "IMAGE"),
    ),
    "BonsaiRightGradients": Node(_inputs("model"), ("MODEL",)),
}
