"""The packs' Qwen3 text encoders as ComfyUI's CLIP: ComfyUI's own Qwen3 class and tokenizer, weights kept in 4 bit.

Klein reads hidden states 9, 18 and 27 (the inputs of those layers) of all 512 right-padded positions, so the layers
from 27 on and the final norm never matter: they are neither loaded nor computed. Prompts are cut at 512 tokens,
template included, as the official pipeline does; stock ComfyUI does not cut.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.flux as flux_text
import torch
from transformers import Qwen2Tokenizer

from ..weights.errors import PackError
from ..weights.formats import DenseTensor, Entry, hqq, mlx
from ..weights.formats.dense import read_entries as read_dense
from ..weights.formats.entries import describe_shape
from ..weights.formats.safetensors_file import SafetensorsFile
from ..weights.packed_weight import PackedWeight
from .layout import wrapped
from .linear import make_bonsai_ops
from .patcher import adopt
from .progress import Progress

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

HEAD_DIM = 128
MAX_TOKENS = 512
LAYERS = 27
"""The highest hidden state that Klein reads; the first LAYERS layers produce it."""
UNPACKED_FOLDER = "text_encoder"
TEMPLATE_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<think>": 151667,
    "</think>": 151668,
}
PREFIX = "model."
AS_PUBLISHED = "Use the text encoder as it was published."


class TruncatingTokenizer(flux_text.KleinTokenizer):
    """Klein's tokenizer that keeps the first 512 tokens of a longer prompt."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict:
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        longest = max(len(row) for rows in tokens.values() for row in rows)
        if longest > MAX_TOKENS:
            logger.warning(
                "Bonsai: the prompt has %d tokens with its template, the last %d are not read",
                longest,
                longest - MAX_TOKENS,
            )
        return {name: [row[:MAX_TOKENS] for row in rows] for name, rows in tokens.items()}


def load_bonsai_text_encoder(
    path: str | Path,
    embedding_directory: list[str] | None = None,
    *,
    disable_dynamic: bool = False,
    progress: Progress | None = None,
) -> comfy.sd.CLIP:
    """Loads the text encoder of a pack: an MLX .safetensors, an HQQ qmodel.pt, an unpacked file or a pack folder.

    embedding_directory: folders of textual inversions, as ComfyUI's own loaders get them. progress(weights done,
    weights in all) is called a layer. Raises PackError for a file that cannot be used.
    """
    started = time.perf_counter()
    files = find_text_encoder(Path(path))
    kind, entries = _open(files)
    config, entries = _measure(files[0], entries)
    total = sum(e.shape[0] * e.shape[1] for e in entries.values() if len(e.shape) == 2)
    done, weights = 0, {}
    for name, entry in entries.items():
        weights[name] = entry.load() if not hasattr(entry, "pack") else entry.pack()
        if len(entry.shape) == 2:
            done += entry.shape[0] * entry.shape[1]
            if progress is not None:
                progress(done, total)
    packed = [w for w in weights.values() if isinstance(w, PackedWeight)]
    resident = sum(w.nbytes for w in weights.values())
    # fp32: ComfyUI feeds text encoders fp32; packed and dense matrices keep their own bytes whatever stands here.
    options = {"custom_operations": make_bonsai_ops(), "qwen3_4b_model_config": config, "dtype": torch.float32}
    target = comfy.supported_models_base.ClipTarget(_tokenizer_class(files[0]), flux_text.klein_te())
    clip = comfy.sd.CLIP(
        target,
        state_dict=[wrapped(weights, torch.float32)],
        model_options=options,
        embedding_directory=embedding_directory,
        disable_dynamic=disable_dynamic,
    )
    adopt(clip.patcher)
    clip.patcher.cached_patcher_init = (load_text_encoder_patcher, (str(path), embedding_directory))
    logger.info(
        "Bonsai text encoder: %s, %d layers, %d matrices packed, %.1f MB, %.1f s from %s",
        kind,
        LAYERS,
        len(packed),
        resident / 1e6,
        time.perf_counter() - started,
        files[0],
    )
    return clip


def load_text_encoder_patcher(
    path: str, embedding_directory: list[str] | None = None, disable_dynamic: bool = False
) -> ModelPatcher:
    """The ModelPatcher alone, for ComfyUI's clones through `cached_patcher_init`."""
    return load_bonsai_text_encoder(path, embedding_directory, disable_dynamic=disable_dynamic).patcher


def find_text_encoder(path: Path) -> list[Path]:
    """The text encoder file (or the parts of a sharded one) of a pack folder or of its own folder.

    Raises PackError if there is none.
    """
    if path.is_file():
        return [path]
    for name in (mlx.TEXT_ENCODER_FILE, hqq.FILE, Path(hqq.FILE).name):
        if (path / name).is_file():
            return [path / name]
    for folder in (path / UNPACKED_FOLDER, path):
        parts = sorted(p for p in folder.glob("model*.safetensors") if not p.name.startswith("."))
        if parts:
            return parts
    raise PackError(
        path,
        "holds no text encoder",
        f"Expected {mlx.TEXT_ENCODER_FILE}, {hqq.FILE} or "
        f"{UNPACKED_FOLDER}/model.safetensors: download the whole repository into this folder.",
    )


def _open(files: list[Path]) -> tuple[str, dict[str, Entry]]:
    """(format, entries) of all files together."""
    entries: dict[str, Entry] = {}
    kind = ""
    for path in files:
        if path.suffix == ".pt":
            kind, found = "hqq", hqq.read_entries(path)
        elif path.suffix in (".safetensors", ".sft"):
            opened = SafetensorsFile(path)
            kind, found = ("mlx", mlx.read_entries(opened)) if mlx.is_mlx(opened) else ("unpacked", read_dense(opened))
        else:
            raise PackError(
                path,
                f"has the unknown ending {path.suffix!r}",
                "Expected an MLX model.safetensors or an HQQ qmodel.pt.",
            )
        entries |= found
    return kind, entries


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


def _measure(path: Path, entries: Mapping[str, Entry]) -> tuple[dict, dict[str, Entry]]:
    """(ComfyUI's Qwen3 config, the entries it needs). Raises PackError for another model or a bad tensor."""
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
            raise PackError(path, describe_shape(entries[name]), f"Expected {list(shape)}. {AS_PUBLISHED}", name)
        if not isinstance(entries[name], DenseTensor) and len(shape) != 2:
            raise PackError(path, "is packed", f"Expected a dense vector. {AS_PUBLISHED}", name)
        needed[name] = entries[name]
    return config, needed


def _tokenizer_class(path: Path) -> type:
    """ComfyUI's tokenizer files where they know Qwen3's special tokens, else those beside the text encoder."""

    class PackTokenizer(TruncatingTokenizer):
        def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {})
            if not _knows_template(self.qwen3_4b.tokenizer):
                self.qwen3_4b.tokenizer = _tokenizer_beside(path)

    return PackTokenizer


def _knows_template(tokenizer: Qwen2Tokenizer) -> bool:
    return all(tokenizer.convert_tokens_to_ids(token) == number for token, number in TEMPLATE_IDS.items())


def _tokenizer_beside(path: Path) -> Qwen2Tokenizer:
    """The tokenizer of the pack folder `path` lies in. Raises PackError if there is none or it is not Qwen3's."""
    for folder in (path.parent / "tokenizer", path.parent.parent / "tokenizer"):
        if folder.is_dir():
            tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
            if _knows_template(tokenizer):
                return tokenizer
    raise PackError(
        path,
        "needs Qwen3's tokenizer, and this ComfyUI's lacks its special tokens",
        "Update ComfyUI, or put the pack's tokenizer folder beside the text encoder.",
    )
