"""The layers of gemlite, in whatever file they lie: what `GemLiteLinear.state_dict()` holds in gemlite 0.6.0.post2.

For each quantized layer (N, K) with b bits a code, e codes a word of e b = 8, 16, 32 or 64 bits, groups of g columns:

    <layer>.W_q         u8, i16, i32, i64  [K / e, N]  code[n, k] = (W_q[k // e, n] >> (b (k % e))) & (2^b - 1)
    <layer>.scales      float              [K / g, N], or [1, N] for groups as wide as the layer
    <layer>.zeros       float              like scales; or one number; or empty
    <layer>.metadata    i32                [12]        the values that FIELDS names
    <layer>.orig_shape  i32                [2]         N, K
    <layer>.meta_scale  fp32               []          since 0.6
    <layer>.bias        float              [N]         where the layer has one

    W_group_mode   channel_scale_mode   w[n, k] with s and z from row k // g of the tables, in float32, rounded once
    4              0                    code * s + z
    3              0                    (code - z) * s
    2              0                    code * s
    1              1                    (code - z) * s     scales [1, N]
    0              1                    code * s           scales [1, N]

`meta_scale` multiplies nothing here: gemlite's kernels for NVFP4 weights (groups of 16) multiply the product by it, its
kernels for integer codes never read it, and its packer writes 0 for them. It is refused unless it could change nothing.
`data_contiguous` tells how W_q lay in memory, not what it holds; output_dtype and acc_dtype are of the product. The
shape always comes from orig_shape: the codes of a (3072, 12288) layer look like a square weight.

gemlite's packer for CPUs loses half of the codes in words of 64 bits: it shifts 32-bit integers. Such words are the
32-bit ones with their sign continued, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..codec import spread_fields
from ..errors import PackError
from .entries import FLOATS, CodedTensor, DenseTensor, Entry
from .file import PackFile

FIELDS = (
    *("scaled_activations", "W_nbits", "group_size", "unpack_mask", "elements_per_sample", "input_dtype"),
    *("output_dtype", "acc_dtype", "meta_dtype", "channel_scale_mode", "W_group_mode", "data_contiguous"),
)
"""What the values of `metadata` are called in gemlite, in their order."""
DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}
"""gemlite's numbers of the dtypes that a layer may compute in; the others quantize its input or its scales."""
WORDS = {torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
"""{dtype of W_q: bits of a word}."""
BITS = (1, 2, 4)
GROUPED = {4: "added", 3: "subtracted", 2: ""}
"""{W_group_mode with a scale a group: what is done with zeros}."""
WHOLE_ROWS = {1: "subtracted", 0: ""}
"""The same with one scale a row, channel_scale_mode 1."""
GROUP_SIZES = (128, 64, 32)
"""How a table of one scale a row is spread: the first that divides K."""
NEEDED = ("W_q", "scales", "zeros", "metadata", "orig_shape")
CHECKED_ROWS = 8
"""About how many rows of 64-bit words are looked at."""
NO_EFFECT = (0.0, 1.0)
"""Values of meta_scale that change nothing, whether it is multiplied by or not used."""


@dataclass(frozen=True)
class Stored:
    """The tensors of an opened file. described: {name: (shape, dtype)}. cure: what helps against a damaged one."""

    file: PackFile
    described: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    get: Callable[[str], torch.Tensor]
    cure: str

    def error(self, key: str, found: str, expected: str) -> PackError:
        """The error to raise for the tensor `key`."""
        return self.file.error(found, f"{expected} {self.cure}", key)

    def dense(self, key: str) -> DenseTensor:
        """The entry of a tensor that is handed over as it is."""
        return DenseTensor(self.file.path, key, *self.described[key], lambda: self.get(key))


@dataclass(frozen=True)
class Layer:
    """A quantized layer [N, K] of a file, checked. metadata: {name of FIELDS: value}."""

    stored: Stored
    name: str
    shape: tuple[int, int]
    metadata: Mapping[str, int]

    @property
    def word_bits(self) -> int:
        """Bits of a word of codes."""
        return WORDS[self.dtype("W_q")]

    def dtype(self, leaf: str) -> torch.dtype:
        """Dtype of one of its tensors."""
        return self.stored.described[f"{self.name}.{leaf}"][1]

    def entry(self) -> CodedTensor:
        """Its codes and tables, keyed `<layer>.weight` like dense ones."""
        get, bits, columns = self.stored.get, self.metadata["W_nbits"], self.shape[1]
        whole = bool(self.metadata["channel_scale_mode"])
        role = (WHOLE_ROWS if whole else GROUPED)[self.metadata["W_group_mode"]]
        group_size = next(g for g in GROUP_SIZES if columns % g == 0) if whole else self.metadata["group_size"]
        table = (self.shape[0], columns // group_size)

        def tables() -> tuple[torch.Tensor, torch.Tensor]:
            scales = get(f"{self.name}.scales").t().expand(table)
            if not role:
                return scales, torch.zeros(table, dtype=scales.dtype)
            zeros = get(f"{self.name}.zeros")
            zeros = zeros.float().reshape(1, 1) if zeros.numel() == 1 else zeros.t()
            return scales, zeros.expand(table)

        def fields(lo: int, hi: int) -> torch.Tensor:
            return get(f"{self.name}.W_q")[:, lo:hi].t().contiguous().view(torch.uint8)

        return CodedTensor(
            self.stored.file.path,
            f"{self.name}.weight",
            self.shape,
            bits,
            group_size,
            tables,
            lambda lo, hi: spread_fields(fields(lo, hi), bits),
            zero_point=role == "subtracted",
            fields=fields,
        )


def read_tensors(stored: Stored) -> tuple[dict[str, Entry], list[Layer]]:
    """({name: entry} of every tensor, the quantized layers). Raises PackError; reads the small tables only."""
    entries: dict[str, Entry] = {}
    layers: list[Layer] = []
    for key, (shape, dtype) in stored.described.items():
        name, _, leaf = key.rpartition(".")
        packed = f"{name}.W_q" in stored.described
        if leaf == "W_q":
            layers.append(_layer(stored, name))
            entries[f"{name}.weight"] = layers[-1].entry()
        elif leaf in NEEDED or leaf == "meta_scale":
            if not packed:
                raise stored.error(key, "stands alone", f"Expected {name}.W_q beside it.")
        elif leaf == "weight" and packed:
            raise stored.error(key, f"stands beside {name}.W_q", "A layer is dense or packed.")
        elif leaf in ("weight", "bias") and dtype in FLOATS:
            entries[key] = stored.dense(key)
        else:
            raise stored.error(
                key,
                f"is {dtype} {list(shape)}",
                f"Expected a 16-bit .weight or one of {', '.join(NEEDED)}, meta_scale.",
            )
    return entries, layers


def _layer(stored: Stored, name: str) -> Layer:
    for leaf in NEEDED:
        if f"{name}.{leaf}" not in stored.described:
            raise stored.error(f"{name}.{leaf}", "is missing", f"Every packed layer has {', '.join(NEEDED)}.")
    for leaf, dtypes in (("W_q", WORDS), ("scales", DTYPES.values())):
        _require_dtype(stored, f"{name}.{leaf}", tuple(dtypes))
    metadata = dict(zip(FIELDS, _numbers(stored, f"{name}.metadata", len(FIELDS)), strict=True))
    rows, columns = _numbers(stored, f"{name}.orig_shape", 2)
    layer = Layer(stored, name, (rows, columns), metadata)
    _require_meaning(layer)
    _require_idle_meta_scale(stored, f"{name}.meta_scale")
    group_size = GROUP_SIZES[-1] if metadata["channel_scale_mode"] else metadata["group_size"]
    if rows < 1 or columns < group_size or columns % group_size or columns % metadata["elements_per_sample"]:
        raise stored.error(
            f"{name}.orig_shape",
            f"says {rows} x {columns}",
            f"Expected columns in groups of {group_size} and in words of {metadata['elements_per_sample']} codes.",
        )
    _require_shapes(layer)
    if layer.word_bits == 64:
        _require_whole_words(stored, f"{name}.W_q")
    return layer


def _require_dtype(stored: Stored, key: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if stored.described[key][1] not in dtypes:
        raise stored.error(key, f"is {stored.described[key][1]}", f"Expected {', '.join(map(str, dtypes))}.")


def _numbers(stored: Stored, key: str, count: int) -> list[int]:
    _require_dtype(stored, key, (torch.int32, torch.int64))
    found = math.prod(stored.described[key][0])
    if found != count:
        raise stored.error(key, f"has {found} values", f"Expected {count}.")
    return stored.get(key).flatten().tolist()


def _require_meaning(layer: Layer) -> None:
    """Raises PackError for metadata that gives the codes a meaning that is not read, or contradicts the codes."""
    told, key = layer.metadata, f"{layer.name}.metadata"
    bits, group_size, mode = (told[field] for field in ("W_nbits", "group_size", "W_group_mode"))
    by_row = told["channel_scale_mode"] == 1
    modes = WHOLE_ROWS if by_row else GROUPED
    grouped = by_row or (group_size >= 32 and group_size % 32 == 0)
    if bits not in BITS or not grouped or mode not in modes:
        raise layer.stored.error(
            key,
            f"says {bits} bits, group size {group_size}, W_group_mode {mode}",
            f"Expected 1, 2 or 4 bits, a multiple of 32 and mode {', '.join(map(str, modes))}.",
        )
    expected = {
        "scaled_activations": (0,),
        "channel_scale_mode": (0, 1),
        "unpack_mask": (2**bits - 1,),
        "elements_per_sample": (layer.word_bits // bits,),
        "input_dtype": tuple(DTYPES),
        "meta_dtype": tuple(DTYPES),
    }
    for field, values in expected.items():
        if told[field] not in values:
            raise layer.stored.error(
                key,
                f"says {field} {told[field]}",
                f"Expected {' or '.join(map(str, values))} for {bits}-bit codes in {layer.dtype('W_q')} words.",
            )


def _require_shapes(layer: Layer) -> None:
    (rows, columns), told, stored = layer.shape, layer.metadata, layer.stored
    groups = 1 if told["channel_scale_mode"] else columns // told["group_size"]
    role = (WHOLE_ROWS if told["channel_scale_mode"] else GROUPED)[told["W_group_mode"]]
    table = (groups, rows)
    shapes = {"W_q": (columns // told["elements_per_sample"], rows), "scales": table}
    zeros = stored.described[f"{layer.name}.zeros"][0]
    if role:
        one_number = role == "subtracted" and math.prod(zeros) == 1
        if not one_number:
            _require_dtype(stored, f"{layer.name}.zeros", tuple(DTYPES.values()))
            shapes["zeros"] = table
    elif math.prod(zeros):
        raise stored.error(
            f"{layer.name}.zeros",
            f"has shape {list(zeros)}",
            f"Expected none with W_group_mode {told['W_group_mode']}.",
        )
    for leaf, shape in shapes.items():
        found = stored.described[f"{layer.name}.{leaf}"][0]
        if tuple(found) != shape:
            raise stored.error(
                f"{layer.name}.{leaf}",
                f"has shape {list(found)}",
                f"Expected {list(shape)} for a layer of {rows} x {columns}.",
            )


def _require_idle_meta_scale(stored: Stored, key: str) -> None:
    if key not in stored.described:
        return
    shape, dtype = stored.described[key]
    if math.prod(shape) != 1 or dtype not in FLOATS:
        raise stored.error(key, f"is {dtype} {list(shape)}", "Expected one fp32 number.")
    value = stored.get(key).item()
    if value not in NO_EFFECT:
        raise stored.error(
            key,
            f"is {value:g}",
            "Expected 0, as gemlite packs 1-bit and 2-bit layers: it multiplies NVFP4 weights only.",
        )


def _require_whole_words(stored: Stored, key: str) -> None:
    """Raises PackError for 64-bit words whose upper halves only continue the sign of the lower; looks at a few rows."""
    words = stored.get(key)
    words = words[:: max(1, len(words) // CHECKED_ROWS)]
    low = words.to(torch.int32)
    if torch.equal(low.to(torch.int64), words) and not bool(((low == 0) | (low == -1)).all()):
        raise stored.error(
            key,
            "has 64-bit words with nothing in their upper halves: gemlite's packer for CPUs lost those codes",
            "Pack it again on a GPU or with packing_bitwidth 32.",
        )
