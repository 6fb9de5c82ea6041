"""Text from a pack's encoder: the layers that prompts do without, read when they are first asked for.

ComfyUI's nodes generate with every layer of a language model and its final norm. `generating` has a text encoder of the
first qwen3.LAYERS of them read the rest then; until then they take no memory. Both parts share the first layers, and
ComfyUI manages the rest as a model of its own.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..weights import qwen3
from ..weights.errors import escaped
from ..weights.read import open_text_encoder, read_weights
from .flags import kept_as_asked, maps_files
from .layout import wrapped
from .lora import merges_models
from .patcher import adopt
from .precision import make_text_ops

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)


def generating(base: type, path: Path, compute_dtype: str = "auto") -> type:
    """ComfyUI's class of a Klein text encoder, for one that was loaded from `path` with its first layers only.

    compute_dtype: as for make_text_ops.
    """

    class PackTextEncoder(base):
        _whole: _Whole | None = None

        def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            """As ComfyUI's. Raises PackError if the file does not hold all layers, ValueError for a merge."""
            _refuse_merge(self)
            if self._whole is None:
                self._whole = _Whole(self, base, path, compute_dtype)
            return self._whole.on(self.qwen3_4b.execution_device).generate(tokens, *args, **kwargs)

    return PackTextEncoder


def _refuse_merge(encoder: torch.nn.Module) -> None:
    """Raises ValueError if a text encoder is loaded as a merge: the layers that were never asked for are not merged."""
    for loaded in comfy.model_management.current_loaded_models:
        patcher = loaded.model
        if patcher is not None and patcher.model is encoder and any(map(merges_models, patcher.patches.values())):
            raise ValueError(
                "this text encoder is a merge of its first layers, all that prompts need; text needs every layer. "
                "Generate text with one of the text encoders that were merged"
            )


class _Whole:
    """A text encoder with every layer: the first are those of `part`, which has no others. Raises PackError.

    It is no module of `part`, so it is neither saved nor counted with that.
    """

    def __init__(self, part: torch.nn.Module, base: type, path: Path, compute_dtype: str) -> None:
        pack, sizes = open_text_encoder(path, maps_files(), whole=True)
        first = qwen3.expected_shapes(sizes | {"num_hidden_layers": qwen3.LAYERS})
        rest = replace(pack, entries={name: e for name, e in pack.entries.items() if name not in first})
        options = {"custom_operations": make_text_ops(compute_dtype), "qwen3_4b_model_config": sizes}
        self.model = base(device="cpu", dtype=torch.float32, model_options=options)
        own, shared = self.model.qwen3_4b.transformer.model, part.qwen3_4b.transformer.model
        own.embed_tokens = shared.embed_tokens
        for i in range(qwen3.LAYERS):
            own.layers[i] = shared.layers[i]
        weights = kept_as_asked(read_weights(rest))
        self.model.load_sd(wrapped(weights, torch.float32))
        self.rest = torch.nn.ModuleList([*own.layers[qwen3.LAYERS :], own.norm])
        self.patcher: ModelPatcher | None = None
        logger.info(
            "Bonsai text encoder: layers %d to %d of %s for generating text, %.1f MB",
            qwen3.LAYERS + 1,
            sizes["num_hidden_layers"],
            escaped(str(path)),
            sum(w.nbytes for w in weights.values()) / 1e6,
        )

    def on(self, device: torch.device) -> torch.nn.Module:
        """It, ready to compute on `device`."""
        if self.patcher is None or self.patcher.load_device != device:
            offload = comfy.model_management.text_encoder_offload_device()
            self.patcher = comfy.model_patcher.ModelPatcher(self.rest, device, offload)
            adopt(self.patcher)
        comfy.model_management.load_models_gpu([self.patcher])
        self.model.set_clip_options({"execution_device": device})
        return self.model
