"""Pack formats. `open_pack(path)` opens a file, says which format it has and hands over its tensors.

One file a format; each opens with the bytes and has

    NAME            what the format is called
    FILE            the container it lies in: a subclass of PackFile, which knows its endings
    PLACES          {part of a pipeline that it is read for: where releases have it}; a part may have no such place
    claims(file)    whether the opened FILE is of this format
    read(file)      the Pack. Raises PackError

A new format is such a file and one word in FORMATS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..errors import PackError
from ..rotation import require_unrotated
from . import dense, gemlite, gemlite_safetensors, gguf, hqq, mlx, native
from .entries import CodedTensor, DenseTensor, Entry, Pack, PackedTensor
from .file import PackFile
from .safetensors_file import JoinedFile

__all__ = ["FORMATS", "CodedTensor", "DenseTensor", "Entry", "Pack", "PackError", "PackedTensor", "open_pack"]


class Format(Protocol):
    """What a module of FORMATS has."""

    NAME: str
    FILE: type[PackFile]
    PLACES: dict[str, tuple[str, ...]]

    def claims(self, file: PackFile) -> bool: ...

    def read(self, file: PackFile) -> Pack: ...


FORMATS: tuple[Format, ...] = (native, mlx, gemlite_safetensors, hqq, gemlite, gguf, dense)
"""The first that claims a file reads it."""

PARTS = {
    "transformer": ("a transformer", "Load Bonsai Model"),
    "text_encoder": ("a text encoder", "Load Bonsai Text Encoder"),
}
"""{part of a pipeline: (what it is, the node that loads it)}."""


def formats_of(part: str) -> list[Format]:
    """The formats that a part of a pipeline may have."""
    return [form for form in FORMATS if part in form.PLACES]


def suffixes_of(part: str) -> list[str]:
    """The endings of the files in them."""
    return list(dict.fromkeys(suffix for form in formats_of(part) for suffix in form.FILE.SUFFIXES))


def open_pack(path: Path | str, part: str = "transformer", mapped: bool = True, shards: Sequence[Path] = ()) -> Pack:
    """Opens a file; reads headers only. mapped: as for PackFile. shards: all files of the model whose first is `path`.

    Raises PackError for one that is not of a format of this part and for weights in a rotated basis.
    """
    path = Path(path)
    container = next((form.FILE for form in FORMATS if path.suffix.lower() in form.FILE.SUFFIXES), None)
    if container is None:
        raise PackError(
            path,
            f"has the unknown ending {path.suffix!r}",
            f"Expected {PARTS[part][0]} ending in {', '.join(suffixes_of(part))}, of one of the formats "
            f"{', '.join(form.NAME for form in formats_of(part))}.",
        )

    def opened(mapped: bool) -> PackFile:
        return JoinedFile(shards, mapped) if len(shards) > 1 else container(path, mapped)

    file = opened(mapped or container.READ_WHOLE)  # mapped, such a one is refused before it is read
    require_unrotated(file, _folders())
    if file.mapped and not mapped:
        file = opened(False)
    form = next((form for form in FORMATS if form.FILE is container and form.claims(file)), None)
    if form is None:
        raise file.error("is of no known format", f"Expected {', '.join(form.NAME for form in formats_of(part))}.")
    if part not in form.PLACES:
        what, node = PARTS[next(iter(form.PLACES))]
        raise file.error(f"is {what} (format {form.NAME})", f'Load it with "{node}".')
    return replace(form.read(file), census=file.census())


def _folders() -> set[str]:
    """What the folders of a release's parts are called."""
    places = (PurePosixPath(place) for form in FORMATS for places in form.PLACES.values() for place in places)
    return {place.parent.name for place in places} - {""}
