"""A transformer file of any format -> {BFL name: packed or dense weight}. Knows no ComfyUI."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from . import flux2
from .errors import PackError
from .formats import DenseTensor, Entry, Pack, PackedTensor, open_pack
from .formats.dense import find_levels
from .formats.entries import DOWNLOAD_AGAIN
from .packed_weight import PackedWeight, at_density

HASH_BYTES = 16 << 20


def open_transformer(path: str | Path) -> tuple[Pack, dict[str, Entry]]:
    """(the open pack, {BFL name: entry}): headers only, checked for completeness. Raises PackError.

    A native file of another architecture has ComfyUI's names for it; only ComfyUI can tell whether it is complete.
    """
    pack = open_pack(path)
    if pack.architecture != "flux2":
        return pack, dict(pack.entries)
    _, entries = flux2.to_bfl(pack.path, pack.entries)
    if not any(flux2.is_block_linear(name) and _can_be_packed(pack, entry) for name, entry in entries.items()):
        raise PackError(pack.path, "has no packed layer", "Use the file as it was published.")
    return pack, entries


def _can_be_packed(pack: Pack, entry: Entry) -> bool:
    """Dense tensors of an unpacked file are packed while they are read; those of other formats stay dense."""
    return pack.format == "unpacked" or not isinstance(entry, DenseTensor)


def read_weights(
    pack: Pack,
    entries: Mapping[str, Entry],
    progress: Callable[[int, int], None] | None = None,
    density: str = "compact",
) -> dict[str, PackedWeight | torch.Tensor]:
    """{BFL name: packed or dense weight} of an open pack; the layers of the blocks end up packed in `density`.

    Codes are repacked layer by layer; dense tensors and codes that are in the density already stay mapped from the
    file. Raises PackError.
    """
    total = sum(e.shape[0] * e.shape[1] for e in entries.values() if len(e.shape) == 2)
    done = 0
    weights: dict[str, PackedWeight | torch.Tensor] = {}
    for name, entry in entries.items():
        if isinstance(entry, PackedTensor):
            weights[name] = entry.load()
        elif not isinstance(entry, DenseTensor):
            weights[name] = entry.pack()
        elif pack.format == "unpacked" and flux2.is_block_linear(name):
            weights[name] = find_levels(entry).pack()
        else:
            weights[name] = entry.load()
        if isinstance(weights[name], PackedWeight):
            weights[name] = _at_density(entry, weights[name], density)
        if len(entry.shape) == 2:
            done += entry.shape[0] * entry.shape[1]
            if progress is not None:
                progress(done, total)
    return weights


def _at_density(entry: Entry, weight: PackedWeight, density: str) -> PackedWeight:
    try:
        return at_density(weight, density)
    except ValueError as error:
        raise PackError(entry.path, f"has damaged codes ({error})", DOWNLOAD_AGAIN, entry.key) from error


def source_record(path: Path, kind: str, known: Mapping[str, str]) -> dict[str, str]:
    """{"file", "sha256"} of what weights came from: a native file's own record, else the file itself."""
    if known or kind == "native" or not path.is_file():
        return dict(known) or {"file": path.name}
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(HASH_BYTES):
            digest.update(piece)
    return {"file": path.name, "sha256": digest.hexdigest()}
