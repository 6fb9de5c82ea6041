"""Any file -> {name: packed or dense weight}, for transformers and text encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import flux2, qwen3
from .errors import PackError
from .finite import NOT_FINITE, is_finite
from .formats import DenseTensor, Entry, Pack, open_pack
from .formats.entries import DOWNLOAD_AGAIN
from .packed_weight import PackedWeight, at_density
from .release import find_text_encoder, find_transformer

HASH_BYTES = 16 << 20
WEIGHTS = (".weight", ".bias")
"""What is a number to compute with in a model of any architecture; a buffer may be a mask of infinities."""


def open_transformer(path: str | Path) -> Pack:
    """A transformer file, or the one of a pack folder, with BFL names: headers only, checked for completeness.

    Raises PackError. A native file of another architecture has ComfyUI's names for it; only ComfyUI can tell whether
    it is complete.
    """
    pack = open_pack(find_transformer(Path(path)))
    entries = pack.entries
    if pack.architecture == "flux2":
        _, entries = flux2.to_bfl(pack.path, entries)
        if pack.pack_dense is not None:
            for name, entry in entries.items():
                if flux2.is_block_linear(name) and isinstance(entry, DenseTensor):
                    entries[name] = pack.pack_dense(entry)
    if all(isinstance(entry, DenseTensor) for entry in entries.values()):
        raise PackError(pack.path, "has no packed layer", "Use the file as it was published.")
    return replace(pack, entries=entries)


def open_text_encoder(path: str | Path) -> tuple[Pack, dict[str, Any]]:
    """(the text encoder of a file, of its own folder or of a pack folder, its sizes): headers only.

    Its entries are those that are needed (qwen3.py). A sharded one is one pack, called like its first file. Raises
    PackError.
    """
    packs = [open_pack(file, "text_encoder") for file in find_text_encoder(Path(path))]
    entries: dict[str, Entry] = {}
    for pack in packs:
        for name, entry in pack.entries.items():
            if name in entries:
                raise entry.error(
                    f"stands in {entries[name].path.name} too",
                    f"Remove the file that does not belong to {pack.path.parent}, or download the folder again.",
                )
            entries[name] = entry
    sizes, entries = qwen3.measure(packs[0].path, entries)
    return replace(packs[0], entries=entries), sizes


def read_weights(
    pack: Pack, progress: Callable[[int, int], None] | None = None, density: str = "compact"
) -> dict[str, PackedWeight | torch.Tensor]:
    """{name: packed or dense weight} of an open pack, ternary weights in a density of DENSITIES.

    Codes are repacked layer by layer; dense tensors and codes that are in the density already stay mapped from the
    file. progress(weights done, weights in all) is called a matrix. Raises PackError, also for NaN and infinity.
    """
    total = sum(_matrix_size(entry) for entry in pack.entries.values())
    done = 0
    weights: dict[str, PackedWeight | torch.Tensor] = {}
    for name, entry in pack.entries.items():
        weight = entry.weight()
        if pack.architecture == "flux2" or name.endswith(WEIGHTS):
            _require_finite(entry, weight)
        weights[name] = _at_density(entry, weight, density) if isinstance(weight, PackedWeight) else weight
        if progress is not None and _matrix_size(entry):
            done += _matrix_size(entry)
            progress(done, total)
    return weights


def _matrix_size(entry: Entry) -> int:
    return entry.shape[0] * entry.shape[1] if len(entry.shape) == 2 else 0


def _require_finite(entry: Entry, weight: PackedWeight | torch.Tensor) -> None:
    tables = weight.tables() if isinstance(weight, PackedWeight) else {"": weight}
    for table, tensor in tables.items():
        if not is_finite(tensor):
            raise entry.error(f"the {table} table {NOT_FINITE}" if table else NOT_FINITE, DOWNLOAD_AGAIN)


def _at_density(entry: Entry, weight: PackedWeight, density: str) -> PackedWeight:
    try:
        return at_density(weight, density)
    except ValueError as error:
        raise entry.error(f"has damaged codes ({error})", DOWNLOAD_AGAIN) from error


def source_record(path: Path, kind: str, known: Mapping[str, str]) -> dict[str, str]:
    """{"file", "sha256"} of what weights came from: a native file's own record, else the file itself."""
    if known or kind == "native" or not path.is_file():
        return dict(known) or {"file": path.name}
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(HASH_BYTES):
            digest.update(piece)
    return {"file": path.name, "sha256": digest.hexdigest()}
