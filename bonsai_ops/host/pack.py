"""A whole release -> MODEL, CLIP and VAE: one progress over its files, and nothing loaded that is still there.

MODEL depends on how it is to be computed, CLIP on its dtype and files, VAE on its files alone. While ComfyUI still has
what a node gave before, the same CLIP and VAE serve the next choice of mode, layout or dtype of MODEL too. Nothing is
kept for that here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..weights.files import file_size, stamp, unreadable
from ..weights.release import find_text_encoder, find_transformer, find_vae, shards_of
from .loader import load_bonsai_model, require_readable
from .progress import Progress, shares
from .text_encoder import load_bonsai_text_encoder
from .vae import load_vae

if TYPE_CHECKING:
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

_alive: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()
"""{what it was loaded from: CLIP or VAE that somebody else holds}."""


def load_pack(
    folder: Path,
    options: Mapping[str, str] | None = None,
    embedding_directory: Sequence[str] = (),
    progress: Progress | None = None,
    text_compute_dtype: str = "auto",
) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The three parts of a pack folder; arguments as of `load_bonsai_model` and `load_bonsai_text_encoder`.

    progress counts bytes of all files together. Raises PackError before anything is loaded, where that can be told.
    """
    require_readable(folder)
    encoders, vae_file = find_text_encoder(folder), find_vae(folder)
    files = ([vae_file], shards_of(find_transformer(folder)), encoders)
    of_vae, of_model, of_clip = shares(progress, [sum(map(file_size, part)) for part in files])
    vae = _again(("vae", *_seen([vae_file.parent])), lambda: load_vae(folder))
    of_vae(1, 1)
    model = load_bonsai_model(folder, options, progress=of_model)
    clip = _again(
        ("clip", text_compute_dtype, tuple(embedding_directory), *_seen({file.parent for file in encoders})),
        lambda: load_bonsai_text_encoder(
            folder, list(embedding_directory), compute_dtype=text_compute_dtype, progress=of_clip
        ),
    )
    of_clip(1, 1)
    return model, clip, vae


def _again(key: tuple, load: Callable[[], Any]) -> Any:
    """What was loaded from the same files and is still held by somebody, else what `load` gives."""
    found = _alive.get(key)
    if found is None:
        found = _alive[key] = load()
    return found


def _seen(folders: Iterable[Path]) -> Iterable[tuple]:
    """The stamp of every file in them: another download is another key. Raises PackError."""
    for folder in folders:
        try:
            yield from [stamp(file) for file in sorted(folder.iterdir()) if file.is_file()]
        except OSError as error:
            raise unreadable(folder, error) from error
