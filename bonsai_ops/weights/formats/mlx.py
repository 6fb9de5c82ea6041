"""MLX packs: `transformer-packed-mflux/diffusion_pytorch_model.safetensors`, `text_encoder-mlx-4bit/model.safetensors`.

For each quantized layer (N, K) with b = 1, 2 or 4 bits and group size g:

    <layer>.weight   u32   [N, K b / 32]   32 / b codes a word, least significant first, along K
    <layer>.scales   16-bit or fp32 [N, K / g]
    <layer>.biases   like scales

    code[n, k] = (weight[n, k // (32 / b)] >> (b (k % (32 / b)))) & (2^b - 1)
    w[n, k]    = scales[n, k // g] * code[n, k] + biases[n, k // g]        in float32, rounded once

A layer is quantized if and only if `.scales` and `.biases` stand beside its `.weight`; everything else is dense. The
transformer has diffusers names, 1 bit (biases = -scales / 2) or 2 bit (biases = -scales) and g = 128; the text encoder
Hugging Face's Qwen3 names, 4 bit, g = 64, embedding included. Shapes tell b g = 32 words / groups. In a text encoder
the other tensors tell K (columns.py), with that b and g, and no JSON is asked. Else g stands in a JSON beside the file;
without one it is 128 for 1 and 2 bit and 64 for 4 bit, which look alike at 2 and 4 bit.

A trimmed vocabulary, our own addition for small encoders: `<layer>.token_ids`, i32 [R - 1], ascending, beside a packed
embedding of R rows. Row r of the file is that of token token_ids[r - 1]; row 0 is that of every other token. It is read
as the full table of VOCABULARY rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ..codec import spread_fields
from ..files import is_file
from ..json_file import is_count, read_json
from .columns import Columns
from .entries import FLOATS, CodedTensor, Entry, Pack
from .safetensors_file import SafetensorsFile

NAME = "mlx"
FILE = SafetensorsFile
PLACES = {
    "transformer": ("transformer-packed-mflux/diffusion_pytorch_model.safetensors",),
    "text_encoder": ("text_encoder-mlx-4bit/model.safetensors",),
}
CONFIG_NAMES = ("quantization_config.json", "config.json")
TRANSFORMER_BITS = (1, 2, 4)
TEXT_ENCODER_BITS = (4, 1, 2)
"""The first that fits is meant where no JSON beside the file names a group size."""
CURE = "Use the file of a Bonsai release; its text encoder is model.safetensors of mlx-community/Qwen3-4B-4bit."
TEXT_NAMES = ("embed_tokens.", "self_attn.")
"""Parts of names that only text encoders have."""
VOCABULARY = 151936
"""Rows of Qwen3's embedding."""


@dataclass(frozen=True)
class _Named:
    """What a JSON beside the file says of its packed layers; bits is None where it says nothing of them."""

    path: Path
    group_size: int
    bits: int | None

    def reading(self, bits: int | str) -> str:
        """What it makes of a layer, and the cure if that is wrong."""
        return (
            f"read as {bits} bit codes in groups of {self.group_size} because {self.path.name} beside it says so (take "
            "that away if it belongs to another model)"
        )


def claims(file: SafetensorsFile) -> bool:
    """True if some u32 weight has scales and biases beside it."""
    return any(
        dtype == torch.uint32 and name.endswith(".weight") and name[:-7] + ".scales" in file.tensors
        for name, (_, dtype) in file.tensors.items()
    )


def read(file: SafetensorsFile) -> Pack:
    """Every tensor; packed layers are keyed `<layer>.weight` like dense ones."""
    text = any(part in name for name in file.tensors for part in TEXT_NAMES)
    bits = TEXT_ENCODER_BITS if text else TRANSFORMER_BITS
    columns = Columns({name: shape for name, (shape, _) in file.tensors.items()} if text else {})
    named = cache(lambda: _named_sizes(file.path))  # asked only where nothing else tells: it may be another model's
    entries: dict[str, Entry] = {}
    for name, (_, dtype) in file.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases", "token_ids"):
            if f"{layer}.weight" not in file.tensors:
                raise file.error(
                    "stands alone",
                    f"Expected the codes {layer}.weight beside it: use the file as it was published.",
                    name,
                )
            continue
        siblings = [f"{layer}.{s}" in file.tensors for s in ("scales", "biases")]
        if leaf == "weight" and any(siblings):
            coded = _coded(file, layer, columns.of(layer) or named(), bits)
            entries[name] = _expanded(file, layer, coded) if f"{layer}.token_ids" in file.tensors else coded
        elif dtype == torch.uint32:
            raise file.error("has u32 codes without scales and biases", "Use the file as it was published.", name)
        else:
            entries[name] = file.dense(name)
    return Pack(file.path, NAME, entries)


def _coded(file: SafetensorsFile, layer: str, told: _Named | int | None, preferred: tuple[int, ...]) -> CodedTensor:
    """told: the columns of the weight, or the group size that a JSON names, or neither."""
    weight, scales, biases = (f"{layer}.{leaf}" for leaf in ("weight", "scales", "biases"))
    _refuse_float_codes(file, weight, scales, biases)
    for name in (scales, biases):
        if name not in file.tensors:
            raise file.error("is missing", f"{weight} needs it: use the file as it was published.", name)
    (shape, dtype), (table, _) = file.tensors[weight], file.tensors[scales]
    if dtype != torch.uint32 or len(shape) != 2 or len(table) != 2 or table[0] != shape[0]:
        raise file.error(
            f"is {dtype} {list(shape)} with scales {list(table)}",
            "Expected u32 [N, K b / 32] with scales [N, K / g].",
            weight,
        )
    if file.tensors[biases][0] != table:
        raise file.error(
            f"has shape {list(file.tensors[biases][0])}", f"Expected {list(table)} like the scales.", biases
        )
    for name in (scales, biases):
        if file.tensors[name][1] not in FLOATS:
            raise file.error(f"is {file.tensors[name][1]}", "Expected bf16, fp16 or fp32.", name)
    words, groups = shape[1], table[1]
    if isinstance(told, int):
        bits, group_size = _of_columns(file, weight, told, words, groups)
    else:
        bits, group_size = _of_groups(file, weight, told, words, groups, preferred)

    if group_size % 32:
        found = f"has groups of {group_size} columns"
        raise file.error(found, f"Expected a multiple of 32. {CURE}", weight)

    def fields(lo: int, hi: int) -> torch.Tensor:
        return file.copied_rows(weight, lo, hi)

    return CodedTensor(
        file.path,
        weight,
        (shape[0], 32 * words // bits),
        bits,
        group_size,
        lambda: (file.get(scales), file.get(biases)),
        lambda lo, hi: spread_fields(fields(lo, hi), bits),
        reading=told.reading(bits) if isinstance(told, _Named) else "",
        fields=fields,
    )


def _of_columns(file: SafetensorsFile, weight: str, columns: int, words: int, groups: int) -> tuple[int, int]:
    """(bits, group size) of a weight whose columns are known. Raises PackError for what is not read."""
    bits = 32 * words / columns
    if bits not in TEXT_ENCODER_BITS:
        raise file.error(
            f"has {words} words for {columns} columns, {bits:g} bits a code",
            f"Expected 4 bits, or 1 or 2. {CURE}",
            weight,
        )
    if not groups or columns % groups:
        raise file.error(f"has {groups} groups for {columns} columns", "Use the file as it was published.", weight)
    return int(bits), columns // groups


def _of_groups(
    file: SafetensorsFile, weight: str, named: _Named | None, words: int, groups: int, preferred: tuple[int, ...]
) -> tuple[int, int]:
    """(bits, group size) of a weight whose columns nothing tells. Raises PackError for what does not fit."""
    candidates = [
        (bits, 32 * words // (bits * groups)) for bits in preferred if groups and 32 * words % (bits * groups) == 0
    ]
    if named is None:
        fitting = [(b, g) for b, g in candidates if g == _default_group(b)]
    else:
        fitting = [(b, g) for b, g in candidates if g == named.group_size and named.bits in (None, b)]
    if not fitting:
        what = f"has {words} words and {groups} groups a row"
        if named is None:
            cure = "Expected 1 or 2 bit codes with group size 128 or 4 bit codes with group size 64."
        else:
            bits = named.bits or "1, 2 or 4"
            what += f" but was {named.reading(bits)}"
            cure = "Use file and JSON as they were published."
        raise file.error(what, cure, weight)
    return fitting[0]


def _refuse_float_codes(file: SafetensorsFile, weight: str, scales: str, biases: str) -> None:
    """Raises PackError for MLX's other modes: codes of small floats with shared exponents, u8, and no biases."""
    if biases not in file.tensors and scales in file.tensors and file.tensors[scales][1] == torch.uint8:
        raise file.error(
            "has scales of 8 bits and no biases: it holds small floats (mxfp4, nvfp4 or mxfp8), not codes of levels",
            f"Expected MLX's affine codes. {CURE}",
            weight,
        )


def _expanded(file: SafetensorsFile, layer: str, trimmed: CodedTensor) -> CodedTensor:
    """The full embedding table behind a trimmed one. Raises PackError if the ids do not fit its rows."""
    key = f"{layer}.token_ids"
    count, (shape, dtype) = trimmed.shape[0] - 1, file.tensors[key]
    fits = shape == (count,) and count <= VOCABULARY and dtype in (torch.int32, torch.int64)
    ids = file.get(key).to(torch.int64) if fits else torch.zeros(0)
    if not fits or not bool((ids.diff() > 0).all()) or (count and not 0 <= int(ids[0]) <= int(ids[-1]) < VOCABULARY):
        raise file.error(
            f"has shape {list(shape)} and does not fit {trimmed.shape[0]} rows",
            f"Expected {count} ascending token ids below {VOCABULARY}: use the file as it was published.",
            key,
        )
    row_of = torch.zeros(VOCABULARY, dtype=torch.int64)
    row_of[ids] = torch.arange(1, count + 1)

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = trimmed.tables()
        return scale[row_of], zero[row_of]

    def read(lo: int, hi: int) -> torch.Tensor:
        rows = row_of[lo:hi]
        held = rows[rows > 0]  # one after another, for the ids ascend
        first, stop = (int(held[0]), int(held[-1]) + 1) if len(held) else (1, 1)
        codes = torch.cat([trimmed.read(0, 1), trimmed.read(first, stop)])
        return codes[torch.where(rows > 0, rows - first + 1, 0)]

    return replace(trimmed, shape=(VOCABULARY, trimmed.shape[1]), tables=tables, read=read, fields=None)


def _default_group(bits: int) -> int:
    return 64 if bits == 4 else 128


def _named_sizes(path: Path) -> _Named | None:
    """The sizes named in a JSON beside the file, None where none names a group size. Raises PackError."""
    for name in CONFIG_NAMES:
        config = path.parent / name
        if is_file(config):
            content = read_json(config)
            for table in (content, content.get("quantization")) if isinstance(content, dict) else ():
                if isinstance(table, dict) and is_count(table.get("group_size")):
                    bits = table.get("bits")
                    return _Named(config, table["group_size"], bits if is_count(bits) else None)
    return None
