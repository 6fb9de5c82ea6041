"""Where packs lie, and the names that the nodes offer.

Packs lie in `models/bonsai` beside ComfyUI's own model folders; what ships with the plugin lies in the same way in
`models` of this package.

Names always use forward slashes, so that a workflow made on Windows finds its files on Linux and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import folder_paths

from ..weights.errors import PackError
from ..weights.formats import PARTS, suffixes_of
from ..weights.release import find_text_encoder, find_vae, is_text_encoder, may_be_transformer, packs_among

FOLDER = "bonsai"
LORA_KIND = "loras"
SHIPPED = Path(__file__).resolve().parents[1] / "models"
TRANSFORMER_KIND, TEXT_ENCODER_KIND = "diffusion_models", "text_encoders"


def register() -> None:
    """Makes `models/bonsai`, which is created, and the shipped files known to ComfyUI. Safe to call again."""
    path = Path(folder_paths.models_dir) / FOLDER
    path.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(path), is_default=True)
    for kind in (FOLDER, LORA_KIND):
        folder_paths.add_model_folder_path(kind, str(SHIPPED / kind))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    ours = {suffix for part in PARTS for suffix in suffixes_of(part)}
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | ours)


def model_names() -> list[str]:
    """Transformer files in `models/bonsai` and in ComfyUI's diffusion model folders."""
    own = [name for name in _names(FOLDER) if may_be_transformer(name)]
    return own + _others(TRANSFORMER_KIND, suffixes_of("transformer"), own)


def text_encoder_names() -> list[str]:
    """Text encoder files in `models/bonsai` and in ComfyUI's text encoder folders."""
    own = [name for name in _names(FOLDER) if is_text_encoder(name)]
    return own + _others(TEXT_ENCODER_KIND, suffixes_of("text_encoder"), own)


def pack_names() -> list[str]:
    """Folders below `models/bonsai` that hold a transformer at one of the published places."""
    return packs_among(_names(FOLDER))


def model_path(name: str) -> Path:
    """The file behind a name of `model_names`. Raises PackError if it is gone."""
    return _path(name, (FOLDER, TRANSFORMER_KIND))


def text_encoder_path(name: str) -> Path:
    """The file behind a name of `text_encoder_names`. Raises PackError if it is gone."""
    return _path(name, (FOLDER, TEXT_ENCODER_KIND))


def pack_path(name: str) -> Path:
    """The folder behind a name of `pack_names`. Raises PackError if it is gone or has no text encoder or VAE."""
    for root in folder_paths.get_folder_paths(FOLDER):
        path = Path(root) / name
        if ".." not in path.parts and path.is_dir():
            find_text_encoder(path)  # a missing one is told before the transformer is repacked
            find_vae(path)
            return path
    raise PackError(name, "is not in models/bonsai", "Put the pack folder there and refresh the page.")


def _others(kind: str, suffixes: Sequence[str], own: Sequence[str]) -> list[str]:
    """Files of a model folder of ComfyUI's with these endings that are not among our own."""
    return [n for n in _names(kind) if PurePosixPath(n).suffix in suffixes and n not in own]


def _names(kind: str) -> list[str]:
    return [name.replace("\\", "/") for name in folder_paths.get_filename_list(kind)]


def _path(name: str, kinds: tuple[str, ...]) -> Path:
    for kind in kinds:
        path = folder_paths.get_full_path(kind, name)
        if path is not None:
            return Path(path)
    raise PackError(name, f"is in none of the folders {', '.join(kinds)}", "Refresh the page and choose again.")
