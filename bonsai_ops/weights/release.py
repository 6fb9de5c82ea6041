"""Where the parts of a release lie: transformer, text encoder, tokenizer, VAE."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import PackError
from .files import is_file, is_folder
from .formats import formats_of
from .json_file import read_json

VAE = "vae/diffusion_pytorch_model.safetensors"
VAE_CONFIG = "vae/config.json"
TOKENIZER = "tokenizer"
INDEX = ".index.json"
"""What the table of a sharded file's parts is called behind that file's name."""
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors)")
"""What a part of a sharded file is called."""
NO_TRANSFORMER = ("text_encoder", "text_encoders", TOKENIZER, "vae", "scheduler")
"""Folders of a release in which no transformer lies."""


def places_of(part: str) -> list[str]:
    """Where releases have that part, in any of its formats."""
    return list(dict.fromkeys(place for form in formats_of(part) for place in form.PLACES[part]))


def _with_own_folder(part: str) -> list[str]:
    """These places, and the same files in a folder that holds nothing else."""
    places = places_of(part)
    return list(dict.fromkeys([*places, *(PurePosixPath(place).name for place in places)]))


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def find_transformer(path: Path) -> Path:
    """The transformer file of a pack folder, of a sharded one its first part (or `path` itself if it is a file).

    Raises PackError if there is none.
    """
    if not is_folder(path):
        return path
    found = [file for place in _with_own_folder("transformer") if (file := _file_or_shard(path / place)) is not None]
    if not found:
        natives = [file for file in _files(path, "*") if file.suffix.lower() == ".safetensors" and is_file(file)]
        if len(natives) == 1:
            return natives[0]
        raise PackError(
            path,
            "holds no transformer",
            f"Expected one of {', '.join(places_of('transformer'))}: download the whole repository into this folder.",
        )
    if len(found) > 1:
        raise PackError(
            path,
            f"holds several transformers: {', '.join(str(p.relative_to(path)) for p in found)}",
            "Choose one of these files instead of the folder.",
        )
    return found[0]


def holds_transformer(folder: Path) -> bool:
    """Whether a folder has a transformer at one of the published places."""
    return any(_file_or_shard(folder / place) is not None for place in places_of("transformer"))


def _file_or_shard(file: Path) -> Path | None:
    """A file, or the first part of it that is there; None without both."""
    if is_file(file):
        return file
    parts = (part for part in _files(file.parent, f"{file.stem}-*{file.suffix}") if SHARD.fullmatch(part.name))
    return next(parts, None)


def shards_of(file: Path) -> list[Path]:
    """All files of the sharded model that a file is a part of: those of the index beside it, else those that its name
    counts. The file alone if it is no part. Raises PackError for a part that is missing.
    """
    named = SHARD.fullmatch(file.name)
    if named is None:
        return [file]
    index = file.with_name(f"{named['stem']}{named['suffix']}{INDEX}")
    if is_file(index):
        parts = _indexed(index)
        return parts if file in parts else [file]
    count = int(named["count"])
    parts = [file.with_name(f"{named['stem']}-{i:05d}-of-{count:05d}{named['suffix']}") for i in range(1, count + 1)]
    gone = next((part for part in parts if not is_file(part)), None)
    if gone is not None:
        raise PackError(
            file, f"is one of {count} parts, and {gone.name} is not beside it", "Download the whole folder again."
        )
    return parts or [file]


def find_text_encoder(path: Path) -> list[Path]:
    """The text encoder file (or the parts of a sharded one) of a pack folder or of its own folder.

    The parts are those of the index beside them, without one all that are called so. Raises PackError if there is none.
    """
    if not is_folder(path):
        return [path]
    for place in map(PurePosixPath, _with_own_folder("text_encoder")):
        if is_file(path / place):
            return [path / place]
        if is_file(index := path / f"{place}{INDEX}"):
            return _indexed(index)
        if parts := _files(path / place.parent, f"{place.stem}*{place.suffix}"):
            return parts
    raise PackError(
        path,
        "holds no text encoder",
        f"Expected one of {', '.join(places_of('text_encoder'))}: download the whole repository into this folder.",
    )


def _indexed(index: Path) -> list[Path]:
    """The files of the index of a sharded model, {"weight_map": {tensor: file beside it}}. Raises PackError."""
    cure = "Download the whole folder again."
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise PackError(index, "is no table of tensors and their files", cure, "weight_map")
    for tensor, name in files.items():
        if not isinstance(name, str) or not name or PureWindowsPath(name).name != name:
            raise PackError(index, f"lies in {str(name)[:80]!r}", f"Expected a file beside the index. {cure}", tensor)
        if not is_file(index.parent / name):
            raise PackError(index, f"lies in {name[:80]}, which is not there", cure, tensor)
    return [index.parent / name for name in sorted(set(files.values()))]


def find_vae(folder: Path) -> Path:
    """The VAE file of a pack folder. Raises PackError if there is none."""
    path = folder / VAE
    if not is_file(path):
        raise PackError(folder, f"holds no {VAE}", "Download the whole repository into this folder.")
    return path


def packs_among(names: list[str]) -> list[str]:
    """The folders (names with forward slashes) that have one of the named files in a transformer's place."""
    ends = [f"/{place}" for place in places_of("transformer")]
    whole = {f"{m['stem']}{m['suffix']}" if (m := SHARD.fullmatch(name)) else name for name in names}
    return sorted({name.removesuffix(end) for name in whole for end in ends if name.endswith(end)})


def is_text_encoder(name: str) -> bool:
    """Whether a file (a name with forward slashes) lies in a text encoder's place or is called like nothing else."""
    folders = {PurePosixPath(place).parent.name for place in places_of("text_encoder")} - {""}
    alone = {
        PurePosixPath(place).name
        for form in formats_of("text_encoder")
        if len(form.PLACES) == 1
        for place in form.PLACES["text_encoder"]
    }
    path = PurePosixPath(name)
    return path.parent.name in folders or path.name in alone


def may_be_transformer(name: str) -> bool:
    """Whether a file of `models/bonsai` (a name with forward slashes) may be one: no other part's place."""
    return not is_text_encoder(name) and PurePosixPath(name).parent.name not in NO_TRANSFORMER
