"""Names and shapes of the Qwen3 text encoder. FLUX.2 Klein reads hidden states up to number LAYERS.

The layers behind and the final norm never matter to prompts: only what generates text asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import PackError
from .formats.entries import DenseTensor, Entry

HEAD_DIM = 128
LAYERS = 27
"""The highest hidden state that Klein reads; the first LAYERS layers produce it."""
PREFIX = "model."
NORM = f"{PREFIX}norm.weight"
"""The final norm."""
LAYER = re.compile(r"((?:text_encoders\.)?(?:\w+\.transformer\.)?(?:model\.)?)layers\.(\d{1,4})\.")
"""Beginning of a layer's names: alone, as ComfyUI saves a text encoder, and in a checkpoint."""
DEPTHS = {2560: 36}
"""{hidden size: layers} of Qwen3 4B, whose width tells."""
AS_PUBLISHED = "Use the text encoder as it was published."
CURE = "Generate text with a published text encoder, or with CLIPLoader, qwen_3_4b.safetensors and type flux2."


def expected_shapes(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors that ComfyUI's Qwen3 class needs for `config`, but for the final norm."""
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


def own_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of the text encoder, as `model.*`, whatever else is in the file."""
    found = next((m for name in entries if (m := LAYER.match(name))), None)
    if found is None:
        return dict(entries)
    prefix = found[1]
    return {PREFIX + name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}


def depth(entries: Mapping[str, Entry], told: Callable[[int, int], int | None]) -> tuple[int, int]:
    """(layers that follow one another, layers that it should have) of entries named `model.*`.

    told: what a config.json says of an encoder of that width that holds so many. The second is 0 where nothing tells:
    no config, no known width, no final norm.
    """
    numbers = {int(m[2]) for name in entries if (m := LAYER.match(name))}
    count = next((i for i in range(len(numbers)) if i not in numbers), len(numbers))
    last = max(numbers, default=-1) + 1
    width = next((e.shape[-1] for e in [entries.get(f"{PREFIX}embed_tokens.weight")] if e and e.shape), 0)
    return count, told(width, last) or DEPTHS.get(width) or (last if NORM in entries else 0)


def measure(path: Path, entries: Mapping[str, Entry], layers: int = LAYERS) -> tuple[dict, dict[str, Entry]]:
    """(sizes, named as in the model's own config.json; those of the entries, named `model.*`, that are needed).

    layers: how many are. Raises PackError for another model or a bad tensor.
    """
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
        dimensions = 1 if name.endswith("_norm.weight") else 2
        if len(entries[name].shape) != dimensions:
            raise entries[name].wrong_shape(f"Expected {dimensions} dimensions. {AS_PUBLISHED}")
    vocabulary, hidden = entries[f"{PREFIX}embed_tokens.weight"].shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "final_norm": False,
        "intermediate_size": entries[f"{first}mlp.gate_proj.weight"].shape[0],
        "num_attention_heads": entries[f"{first}self_attn.q_proj.weight"].shape[0] // HEAD_DIM,
        "num_key_value_heads": entries[f"{first}self_attn.k_proj.weight"].shape[0] // HEAD_DIM,
    }
    return config, _needed(path, entries, expected_shapes(config), f"Klein reads {LAYERS} layers. {AS_PUBLISHED}")


def measure_whole(path: Path, entries: Mapping[str, Entry], count: int, layers: int) -> tuple[dict, dict[str, Entry]]:
    """As `measure`, for every layer and the final norm: what generating text needs.

    count, layers: as of `depth`. Raises PackError if some are not there.
    """
    if count < layers or NORM not in entries:
        missing = f"{count} of {layers}" if count < layers else f"{count}"
        raise PackError(
            path,
            f"cannot generate text: it holds {missing} layers{'' if NORM in entries else ' and no final norm'}, "
            "enough for prompts only",
            CURE,
        )
    config, needed = measure(path, entries, layers)
    shapes = {NORM: (config["hidden_size"],)}
    return config | {"final_norm": True}, needed | _needed(path, entries, shapes, AS_PUBLISHED)


def _needed(
    path: Path, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], cure: str
) -> dict[str, Entry]:
    """The entries of these names. Raises PackError if one is missing or not of its shape."""
    needed: dict[str, Entry] = {}
    for name, shape in shapes.items():
        if name not in entries:
            raise PackError(path, "is missing", cure, name)
        if tuple(entries[name].shape) != shape:
            raise entries[name].wrong_shape(f"Expected {list(shape)}. {AS_PUBLISHED}")
        if not isinstance(entries[name], DenseTensor) and len(shape) != 2:
            raise entries[name].error("is packed", f"Expected a dense vector. {AS_PUBLISHED}")
        if isinstance(entries[name], DenseTensor):
            entries[name].require_float()
        needed[name] = entries[name]
    modules = {name.rpartition(".")[0] for name in shapes}
    for name, entry in entries.items():
        if name not in shapes and name.rpartition(".")[0] in modules:
            raise entry.error("is unknown", f"A layer of Qwen3 has a weight and nothing else. {AS_PUBLISHED}")
    return needed
