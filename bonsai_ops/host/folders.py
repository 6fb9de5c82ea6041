"""Where packs lie, and the names that the nodes offer.

Packs lie in `models/bonsai` beside ComfyUI's own model folders, and in whatever folders extra_model_paths.yaml calls
`bonsai`; what ships with the plugin lies in the same way in `models` of this package. Of one name in several folders
the first is meant.

ComfyUI's own lists have only the endings that its loaders know, so ours are made here. Names always use forward
slashes, so that a workflow made on Windows finds its files on Linux and back.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import folder_paths

from ..weights.errors import PackError, escaped
from ..weights.formats import PARTS, suffixes_of
from ..weights.release import (
    find_text_encoder,
    find_transformer,
    find_vae,
    holds_transformer,
    is_text_encoder,
    may_be_transformer,
    packs_among,
)

logger = logging.getLogger(__name__)

FOLDER = "bonsai"
LORA_KIND = "loras"
SHIPPED = Path(__file__).resolve().parents[1] / "models"
TRANSFORMER_KIND, TEXT_ENCODER_KIND = "diffusion_models", "text_encoders"
NO_FOLDER = "models/bonsai itself (the repository has no folder of its own)"
"""What a repository is called that was downloaded straight into one of our folders."""
VERSIONED = ".git"
MOST_NAMES = 8
"""Paths under which the files of one folder are offered, where links lead to it."""


@dataclass(frozen=True)
class _Listing:
    """The files below some folders, and {folder: time of its last change, None for one that was not there}."""

    folders: tuple[str, ...]
    changed: dict[str, int | None]
    names: list[str]

    def holds(self, folders: tuple[str, ...]) -> bool:
        return folders == self.folders and all(_changed(path) == time for path, time in self.changed.items())


_listings: dict[str, _Listing] = {}


def register() -> None:
    """Makes `models/bonsai`, which is created if it can be, and the shipped files known to ComfyUI.

    Safe to call again.
    """
    path = Path(folder_paths.models_dir) / FOLDER
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning(
            "Bonsai: %s is no folder and cannot be made one (%s): packs there are not found. Remove what is in its "
            "place or allow writing there, then press R on the page.",
            escaped(str(path)),
            error.strerror or error,
        )
    folder_paths.add_model_folder_path(FOLDER, str(path), is_default=True)
    for kind in (FOLDER, LORA_KIND):
        folder_paths.add_model_folder_path(kind, str(SHIPPED / kind))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    ours = {suffix for part in PARTS for suffix in suffixes_of(part)}
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | ours)


def model_names() -> list[str]:
    """Transformer files in `models/bonsai` and in ComfyUI's diffusion model folders."""
    own = [name for name in _names(FOLDER, "transformer") if may_be_transformer(name)]
    return own + [name for name in _names(TRANSFORMER_KIND, "transformer") if name not in own]


def text_encoder_names() -> list[str]:
    """Text encoder files in `models/bonsai` and in ComfyUI's text encoder folders."""
    own = [name for name in _names(FOLDER, "text_encoder") if is_text_encoder(name)]
    return own + [name for name in _names(TEXT_ENCODER_KIND, "text_encoder") if name not in own]


def pack_names() -> list[str]:
    """Folders below `models/bonsai` that hold a transformer at one of the published places."""
    straight = any(holds_transformer(Path(root)) for root in folder_paths.get_folder_paths(FOLDER))
    return packs_among(_names(FOLDER, "transformer")) + [NO_FOLDER] * straight


def model_path(name: str) -> Path:
    """The file behind a name of `model_names`. Raises PackError if it is gone."""
    return _path(name, (FOLDER, TRANSFORMER_KIND))


def text_encoder_path(name: str) -> Path:
    """The file behind a name of `text_encoder_names`. Raises PackError if it is gone."""
    return _path(name, (FOLDER, TEXT_ENCODER_KIND))


def pack_path(name: str) -> Path:
    """The folder behind a name of `pack_names`. Raises PackError if it is gone or has no text encoder or VAE."""
    inner = "" if name == NO_FOLDER else name
    roots = [Path(root) for root in folder_paths.get_folder_paths(FOLDER)]
    inside = [root / inner for root in roots if (root / inner).is_relative_to(root)]
    found = [path for path in inside if ".." not in path.parts and _changed(path) is not None and path.is_dir()]
    if not found:
        raise PackError(name, "is not in models/bonsai", "Put the pack folder there and refresh the page.")
    path = next(filter(holds_transformer, found), found[0])
    find_transformer(path)
    find_text_encoder(path)  # a missing one is told before the transformer is repacked
    find_vae(path)
    return path


def _names(kind: str, part: str) -> list[str]:
    """Names of the files in the folders of a kind whose ending, in small letters, is one of that part of a pipeline."""
    suffixes = suffixes_of(part)
    return [name for name in _files(kind) if PurePosixPath(name).suffix.lower() in suffixes]


def _files(kind: str) -> list[str]:
    """Names of all files in the folders of a kind, looked up again where something was added or removed."""
    folders = tuple(folder_paths.get_folder_paths(kind))
    known = _listings.get(kind)
    if known is None or not known.holds(folders):
        known = _listings[kind] = _list(folders)
    return known.names


def _list(folders: Sequence[str]) -> _Listing:
    names: set[str] = set()
    changed: dict[str, int | None] = {}
    for folder in folders:
        changed[folder] = _changed(folder)
        for place, files in _walk(folder):
            changed[place] = _changed(place)
            names.update(Path(place, file).relative_to(folder).as_posix() for file in files)
    return _Listing(tuple(folders), changed, sorted(names))


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """(path, names of the files) of a folder and of those below it, also through links; unreadable ones are left out.

    A folder below itself is left out, and one that many links lead to after MOST_NAMES of them: both have no end.
    """
    met: Counter[tuple[int, int]] = Counter()
    around: dict[str, frozenset[tuple[int, int]]] = {}
    for place, inner, files in os.walk(folder, followlinks=True):
        above, own = around.pop(place, frozenset()), _identity(place)
        if own is None or own in above or met[own] >= MOST_NAMES:
            inner.clear()
            continue
        met[own] += 1
        inner[:] = [name for name in inner if name != VERSIONED]
        around.update((os.path.join(place, name), above | {own}) for name in inner)
        yield place, files


def _identity(path: str) -> tuple[int, int] | None:
    """What a folder is on this machine whatever leads to it, None if it cannot be asked."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _changed(path: str | Path) -> int | None:
    """When a folder was last changed, None if it cannot be asked."""
    try:
        return Path(path).stat().st_mtime_ns
    except (OSError, ValueError):  # no file can have a name with a zero in it
        return None


def _path(name: str, kinds: tuple[str, ...]) -> Path:
    for kind in kinds:
        path = folder_paths.get_full_path(kind, name)
        if path is not None:
            return Path(path)
    raise PackError(name, f"is in none of the folders {', '.join(kinds)}", "Refresh the page and choose again.")
