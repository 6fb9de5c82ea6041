"""The packs' Qwen3 text encoders as ComfyUI's CLIP: ComfyUI's own Qwen3 class and tokenizer, weights kept in 4 bit.

Klein reads hidden states 9, 18 and 27 (the inputs of those layers) of all 512 right-padded positions, so the layers
from 27 on and the final norm never matter to prompts: they are neither loaded nor computed before a node generates text
(generation.py). Prompts are cut at 512 tokens, template included, as the official pipeline does; stock ComfyUI does not
cut.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import comfy.supported_models_base
import torch

from .. import kernels
from ..weights import qwen3
from ..weights.errors import escaped
from ..weights.files import is_file
from ..weights.packed_weight import PackedWeight
from ..weights.read import open_text_encoder, read_weights
from ..weights.release import find_text_encoder
from . import comfyui
from .flags import kept_as_asked, maps_files
from .generation import generating
from .layout import wrapped
from .patcher import adopt, refuse_patched
from .precision import DTYPES, make_text_ops, text_dtype
from .progress import Progress
from .record import saved_text_record
from .text_layers import work_in_parts
from .text_states import RememberingCLIP, Source

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
TEXT_DTYPES = ("auto", *DTYPES)
"""What compute_dtype may be."""
ASKED_FOR_WEIGHTS = "comfy.model_patcher.ModelPatcher.model_state_dict_for_saving"
KLEIN, KLEIN_TOKENIZER = "comfy.text_encoders.flux.klein_te", "comfy.text_encoders.flux.KleinTokenizer"


class TruncatingTokenizer(comfyui.optional(KLEIN_TOKENIZER) or object):
    """Klein's tokenizer that keeps the first 512 tokens of a longer prompt.

    What generates text asks for a `min_length` of its own, and no length is too much for it.
    """

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict:
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        if "min_length" in kwargs:
            return tokens
        longest = max(len(row) for rows in tokens.values() for row in rows)
        if longest > MAX_TOKENS:
            logger.warning(
                "Bonsai: the prompt has %d tokens with its template, the last %d are not read",
                longest,
                longest - MAX_TOKENS,
            )
        return {name: [row[:MAX_TOKENS] for row in rows] for name, rows in tokens.items()}


class PackTokenizer(TruncatingTokenizer):
    """ComfyUI's tokenizer: it knows Qwen3's special tokens wherever it knows Klein, whose template has them."""

    encoder: Callable[[], torch.nn.Module | None] = staticmethod(lambda: None)
    """The text encoder whose tokenizer it is."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What ComfyUI saves beside the encoder's weights: our record, where it does not ask the ModelPatcher."""
        encoder = self.encoder()
        if encoder is None or comfyui.optional(ASKED_FOR_WEIGHTS) is not None:
            return super().state_dict()
        refuse_patched(encoder)
        return super().state_dict() | saved_text_record(encoder)


def load_bonsai_text_encoder(
    path: str | Path,
    embedding_directory: list[str] | None = None,
    *,
    compute_dtype: str = "auto",
    disable_dynamic: bool = False,
    progress: Progress | None = None,
) -> comfy.sd.CLIP:
    """Loads the text encoder of a pack folder, or a file: MLX, HQQ, unpacked, or one that ComfyUI saved from such.

    embedding_directory: folders of textual inversions, as ComfyUI's own loaders get them. compute_dtype: auto or one
    of DTYPES, for `text_dtype`. progress(weights done, weights in all) is called a layer. Raises PackError for a file
    that cannot be used, MissingNameError in a ComfyUI that does not know Klein's text encoder, ValueError for an
    unknown compute_dtype.
    """
    started = time.perf_counter()
    if compute_dtype not in TEXT_DTYPES:
        raise ValueError(f"compute_dtype {compute_dtype!r} is unknown, expected one of {', '.join(TEXT_DTYPES)}")
    comfyui.needed(KLEIN_TOKENIZER)
    source = Source(_files(Path(path)), functools.partial(text_dtype, compute_dtype))
    pack, sizes = open_text_encoder(path, maps_files())
    weights = kept_as_asked(read_weights(pack, progress))
    packed = [w for w in weights.values() if isinstance(w, PackedWeight)]
    resident = sum(w.nbytes for w in weights.values())
    # fp32: ComfyUI feeds text encoders fp32; packed and dense matrices keep their own bytes whatever stands here.
    operations = make_text_ops(compute_dtype)
    options = {"custom_operations": operations, "qwen3_4b_model_config": sizes, "dtype": torch.float32}
    encoder = generating(comfyui.needed(KLEIN)(), Path(path), compute_dtype)
    target = comfy.supported_models_base.ClipTarget(PackTokenizer, encoder)
    clip = comfy.sd.CLIP(
        target,
        state_dict=[wrapped(weights, torch.float32)],
        model_options=options,
        embedding_directory=embedding_directory,
        disable_dynamic=disable_dynamic,
    )
    clip = RememberingCLIP(clip, source)
    adopt(clip.patcher)
    if clip.patcher.load_device.type == "cpu":
        work_in_parts(clip.cond_stage_model.qwen3_4b.transformer.model.layers, source.dtype)
    clip.tokenizer.encoder = weakref.ref(clip.cond_stage_model)
    clip.patcher.cached_patcher_init = (load_text_encoder_patcher, (str(path), embedding_directory, compute_dtype))
    held, should = pack.counts["layers"], pack.counts["layers in all"]
    place = escaped(str(pack.path))
    if held < should:
        logger.info("Bonsai text encoder: %s has %d of %d layers, enough for prompts", place, held, should)
    logger.info(
        "Bonsai text encoder: %s, %d layers, %d matrices packed, %.1f MB, multiplies in %s, %.1f s from %s, %s",
        pack.format,
        qwen3.LAYERS,
        len(packed),
        resident / 1e6,
        str(source.dtype(clip.patcher.load_device)).removeprefix("torch."),
        time.perf_counter() - started,
        place,
        pack.release,
    )
    if clip.patcher.load_device.type == "cpu":
        kernels.tell_threads()
    return clip


def _files(path: Path) -> tuple[Path, ...]:
    """The files of a text encoder, and what may tell its sizes. Raises PackError."""
    files = find_text_encoder(path)
    beside = {found for file in files for found in file.parent.glob("*.json") if is_file(found)}
    return (*files, *sorted(beside))


def load_text_encoder_patcher(
    path: str, embedding_directory: list[str] | None = None, compute_dtype: str = "auto", disable_dynamic: bool = False
) -> ModelPatcher:
    """The ModelPatcher alone, for ComfyUI's clones through `cached_patcher_init`."""
    return load_bonsai_text_encoder(
        path, embedding_directory, compute_dtype=compute_dtype, disable_dynamic=disable_dynamic
    ).patcher
