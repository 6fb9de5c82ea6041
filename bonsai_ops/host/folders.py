"""Where packs lie, and the names that the nodes offer.

Packs lie in `models/bonsai` beside ComfyUI's own model folders; what ships with the plugin lies in the same way in
`models` of this package.

Names always use forward slashes, so that a workflow made on Windows finds its files on Linux and back.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import folder_paths

from ..weights.errors import PackError
from ..weights.formats import TRANSFORMER_FILES, hqq, mlx
from .text_encoder import UNPACKED_FOLDER

FOLDER = "bonsai"
LORA_KIND = "loras"
SHIPPED = Path(__file__).resolve().parents[1] / "models"
EXTENSIONS = {".safetensors", ".sft", ".pt"}
MODEL_EXTENSIONS = EXTENSIONS | {".gguf"}
TRANSFORMER_KIND, TEXT_ENCODER_KIND = "diffusion_models", "text_encoders"
NO_TRANSFORMER = ("text_encoder", "text_encoders", "tokenizer", "vae", "scheduler")
"""Folders of a pack in which no transformer lies."""


def register() -> None:
    """Makes `models/bonsai`, which is created, and the shipped files known to ComfyUI. Safe to call again."""
    path = Path(folder_paths.models_dir) / FOLDER
    path.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(path), is_default=True)
    for kind in (FOLDER, LORA_KIND):
        folder_paths.add_model_folder_path(kind, str(SHIPPED / kind))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | MODEL_EXTENSIONS)


def model_names() -> list[str]:
    """Transformer files in `models/bonsai` and in ComfyUI's diffusion model folders."""
    own = [n for n in _names(FOLDER) if not _is_text_encoder(n) and PurePosixPath(n).parent.name not in NO_TRANSFORMER]
    return own + [n for n in _names(TRANSFORMER_KIND) if PurePosixPath(n).suffix in MODEL_EXTENSIONS and n not in own]


def text_encoder_names() -> list[str]:
    """Text encoder files in `models/bonsai` and in ComfyUI's text encoder folders."""
    own = [n for n in _names(FOLDER) if _is_text_encoder(n)]
    return own + [n for n in _names(TEXT_ENCODER_KIND) if PurePosixPath(n).suffix in EXTENSIONS and n not in own]


def pack_names() -> list[str]:
    """Folders below `models/bonsai` that hold a transformer at one of the published places."""
    found = set()
    for name in _names(FOLDER):
        for place in TRANSFORMER_FILES:
            if "/" in place and name.endswith("/" + place):
                found.add(name[: -len(place) - 1])
    return sorted(found)


def model_path(name: str) -> Path:
    """The file behind a name of `model_names`. Raises PackError if it is gone."""
    return _path(name, (FOLDER, TRANSFORMER_KIND))


def text_encoder_path(name: str) -> Path:
    """The file behind a name of `text_encoder_names`. Raises PackError if it is gone."""
    return _path(name, (FOLDER, TEXT_ENCODER_KIND))


def pack_path(name: str) -> Path:
    """The folder behind a name of `pack_names`. Raises PackError if it is gone."""
    for root in folder_paths.get_folder_paths(FOLDER):
        path = Path(root) / name
        if ".." not in path.parts and path.is_dir():
            return path
    raise PackError(name, "is not in models/bonsai", "Put the pack folder there and refresh the page.")


def _is_text_encoder(name: str) -> bool:
    parts = PurePosixPath(name).parts
    folder = parts[-2] if len(parts) > 1 else ""
    published = {PurePosixPath(mlx.TEXT_ENCODER_FILE).parent.name, PurePosixPath(hqq.FILE).parent.name, UNPACKED_FOLDER}
    return folder in published or parts[-1] == PurePosixPath(hqq.FILE).name


def _names(kind: str) -> list[str]:
    return [name.replace("\\", "/") for name in folder_paths.get_filename_list(kind)]


def _path(name: str, kinds: tuple[str, ...]) -> Path:
    for kind in kinds:
        path = folder_paths.get_full_path(kind, name)
        if path is not None:
            return Path(path)
    raise PackError(name, f"is in none of the folders {', '.join(kinds)}", "Refresh the page and choose again.")
