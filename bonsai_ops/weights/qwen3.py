"""Names and shapes of the Qwen3 text encoder. FLUX.2 Klein reads hidden states up to number LAYERS.

The layers behind and the final norm never matter: nothing of them is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import PackError
from .formats.entries import DenseTensor, Entry

HEAD_DIM = 128
LAYERS = 27
"""The highest hidden state that Klein reads; the first LAYERS layers produce it."""
PREFIX = "model."
AS_PUBLISHED = "Use the text encoder as it was published."


def expected_shapes(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors that ComfyUI's Qwen3 class needs for `config`."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * HEAD_DIM, config["num_key_value_heads"] * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {f"{PREFIX}embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"{PREFIX}layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (queries, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, queries),
            f"{layer}self_attn.q_norm.weight": (HEAD_DIM,),
            f"{layer}self_attn.k_norm.weight": (HEAD_DIM,),
            f"{layer}mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}mlp.up_proj.weight": (mlp, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, mlp),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def measure(path: Path, entries: Mapping[str, Entry]) -> tuple[dict, dict[str, Entry]]:
    """(sizes, named as in the model's own config.json; the entries that are needed, as `model.*`).

    Raises PackError for another model or a bad tensor.
    """
    if any(name.startswith("layers.") for name in entries):
        entries = {PREFIX + name: entry for name, entry in entries.items()}
    first = f"{PREFIX}layers.0."
    for name in (
        f"{PREFIX}embed_tokens.weight",
        f"{first}self_attn.q_proj.weight",
        f"{first}self_attn.k_proj.weight",
        f"{first}self_attn.q_norm.weight",
        f"{first}mlp.gate_proj.weight",
    ):
        if name not in entries:
            sample = ", ".join(sorted(entries)[:3]) or "no tensors"
            raise PackError(
                path,
                f"is not a Qwen3 text encoder: it has {sample} and no {name}",
                'Give the text encoder of a Bonsai pack; its transformer goes into "Load Bonsai Model".',
            )
    vocabulary, hidden = entries[f"{PREFIX}embed_tokens.weight"].shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "final_norm": False,
        "intermediate_size": entries[f"{first}mlp.gate_proj.weight"].shape[0],
        "num_attention_heads": entries[f"{first}self_attn.q_proj.weight"].shape[0] // HEAD_DIM,
        "num_key_value_heads": entries[f"{first}self_attn.k_proj.weight"].shape[0] // HEAD_DIM,
    }
    needed: dict[str, Entry] = {}
    for name, shape in expected_shapes(config).items():
        if name not in entries:
            raise PackError(path, "is missing", f"Klein reads {LAYERS} layers. {AS_PUBLISHED}", name)
        if tuple(entries[name].shape) != shape:
            raise entries[name].wrong_shape(f"Expected {list(shape)}. {AS_PUBLISHED}")
        if not isinstance(entries[name], DenseTensor) and len(shape) != 2:
            raise entries[name].error("is packed", f"Expected a dense vector. {AS_PUBLISHED}")
        if isinstance(entries[name], DenseTensor):
            entries[name].require_float()
        needed[name] = entries[name]
    return config, needed
