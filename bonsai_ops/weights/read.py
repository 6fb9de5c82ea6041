"""Any file -> {name: packed or dense weight}, for transformers and text encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import flux2, qwen3
from .depth import require_depth, told_layers
from .device_errors import is_the_devices
from .errors import PackError
from .files import is_file
from .finite import NOT_FINITE, is_finite
from .formats import DenseTensor, Entry, Pack, dense, native, open_pack
from .formats.entries import DOWNLOAD_AGAIN
from .mapped import give_back
from .packed_weight import PackedWeight, at_density
from .release import find_text_encoder, find_transformer, shards_of
from .releases import sha256_of

ALIGNMENT = 64
"""Bytes: where torch's own tensors begin."""
CHECKPOINT = "model.diffusion_model."
"""What the names of the transformer begin with in a checkpoint."""
WEIGHTS = (".weight", ".bias")
"""What is a number to compute with in a model of any architecture; a buffer may be a mask of infinities."""


def open_transformer(path: str | Path, mapped: bool = True) -> Pack:
    """A transformer file (of a sharded one any part), or the one of a pack folder, as `as_transformer` has it.

    mapped: whether its tensors may be of the file's own pages. Raises PackError.
    """
    files = shards_of(find_transformer(Path(path)))
    return as_transformer(open_pack(files[0], mapped=mapped, shards=files))


def as_transformer(pack: Pack) -> Pack:
    """The transformer of an open file, with BFL names: headers only, checked for completeness.

    Raises PackError. A native file of another architecture has ComfyUI's names for it; only ComfyUI can tell whether
    it is complete.
    """
    pack, geometry = _without_other_parts(pack), None
    entries = dict(pack.entries)
    if pack.architecture == "flux2":
        geometry, entries = flux2.to_bfl(pack.path, entries)
        if pack.pack_dense is not None:
            for name, entry in entries.items():
                if flux2.is_block_linear(name) and isinstance(entry, DenseTensor):
                    entries[name] = pack.pack_dense(entry)
    if all(isinstance(entry, DenseTensor) for entry in entries.values()):
        raise PackError(pack.path, "has no packed layer", dense.CURE)
    if geometry is not None:
        require_depth(pack, geometry)
    return replace(pack, entries=entries)


def _without_other_parts(pack: Pack) -> Pack:
    """The pack with nothing but its transformer, of a checkpoint that has text encoder, VAE and the like beside it."""
    prefix = pack.prefix
    if prefix is None and f"{CHECKPOINT}{flux2.MARKER}" in pack.entries:
        prefix = CHECKPOINT
    if not prefix:
        return pack
    entries = {n.removeprefix(prefix): entry for n, entry in pack.entries.items() if n.startswith(prefix)}
    beside = sorted({n.partition(".")[0] for n in pack.entries if not n.startswith(prefix)})
    return replace(pack, entries=entries, beside=tuple(beside))


def open_text_encoder(path: str | Path, mapped: bool = True, *, whole: bool = False) -> tuple[Pack, dict[str, Any]]:
    """(the text encoder of a file, of its own folder, of a pack folder or of a checkpoint, its sizes): headers only.

    Its entries are those that prompts need (qwen3.py), or all of them: `whole`. A sharded one is one pack, called like
    its first file. Its counts: "layers" it holds, and "layers in all" that it should, 0 where nothing tells. mapped: as
    for `open_transformer`. Raises PackError.
    """
    packs = [open_pack(file, "text_encoder", mapped) for file in find_text_encoder(Path(path))]
    return as_text_encoder(*packs, whole=whole)


def as_text_encoder(*packs: Pack, whole: bool = False) -> tuple[Pack, dict[str, Any]]:
    """The same of open files, the parts of one text encoder."""
    entries: dict[str, Entry] = {}
    for pack in packs:
        for name, entry in pack.entries.items():
            if name in entries:
                raise entry.error(
                    f"stands in {entries[name].path.name} too",
                    "Remove the file that does not belong to this folder, or download the folder again.",
                )
            entries[name] = entry
    first, own = packs[0], qwen3.own_names(entries)
    held, should = qwen3.depth(own, partial(told_layers, first.path))
    if whole:
        sizes, needed = qwen3.measure_whole(first.path, own, held, should)
    else:
        sizes, needed = qwen3.measure(first.path, own)
    return replace(first, entries=needed, counts={"layers": held, "layers in all": should}), sizes


def read_weights(
    pack: Pack, progress: Callable[[int, int], None] | None = None, density: str = "compact"
) -> dict[str, PackedWeight | torch.Tensor]:
    """{name: packed or dense weight} of an open pack, ternary weights in a density of DENSITIES.

    Codes are repacked layer by layer; dense tensors and codes that are in the density already stay mapped from the
    file, of which no page that was looked at stays in the process. progress(weights done, weights in all) is called a
    matrix. Raises PackError, also for NaN and infinity.
    """
    total = sum(_matrix_size(entry) for entry in pack.entries.values())
    done = 0
    weights: dict[str, PackedWeight | torch.Tensor] = {}
    for name, entry in pack.entries.items():
        weight = _weight(entry)
        if must_be_finite(name, pack.architecture):
            _require_finite(entry, weight)
        weights[name] = _at_density(entry, weight, density) if isinstance(weight, PackedWeight) else _aligned(weight)
        if progress is not None and _matrix_size(entry):
            done += _matrix_size(entry)
            progress(done, total)
    give_back(weight.codes if isinstance(weight, PackedWeight) else weight for weight in weights.values())
    return weights


def _weight(entry: Entry) -> PackedWeight | torch.Tensor:
    try:
        return entry.weight()
    except PackError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_the_devices(error):
            raise
        raise entry.error(f"cannot be unpacked ({error})", DOWNLOAD_AGAIN) from error


def must_be_finite(name: str, architecture: str) -> bool:
    """Whether a tensor of this name may not hold NaN or infinity."""
    return architecture in ("flux2", native.TEXT_ENCODER) or name.endswith(WEIGHTS)


def _matrix_size(entry: Entry) -> int:
    return entry.shape[0] * entry.shape[1] if len(entry.shape) == 2 else 0


def _require_finite(entry: Entry, weight: PackedWeight | torch.Tensor) -> None:
    tables = weight.tables() if isinstance(weight, PackedWeight) else {"": weight}
    for table, tensor in tables.items():
        if not is_finite(tensor):
            raise entry.error(f"the {table} table {NOT_FINITE}" if table else NOT_FINITE, DOWNLOAD_AGAIN)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A fp32 tensor that lies as in a model that was never saved: elsewhere its products have other last bits."""
    return tensor.clone() if tensor.dtype == torch.float32 and tensor.data_ptr() % ALIGNMENT else tensor


def _at_density(entry: Entry, weight: PackedWeight, density: str) -> PackedWeight:
    try:
        return at_density(weight, density)
    except ValueError as error:
        raise entry.error(f"has damaged codes ({error})", DOWNLOAD_AGAIN) from error


def source_record(path: Path, kind: str, known: Mapping[str, str]) -> dict[str, str]:
    """{"file", "sha256"} of what weights came from: a native file's own record, else the file itself."""
    if known or kind == "native" or not is_file(path):
        return dict(known) or {"file": path.name}
    return {"file": path.name, "sha256": sha256_of(path)}
