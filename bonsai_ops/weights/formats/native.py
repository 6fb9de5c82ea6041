"""Our own file: one .safetensors that is mapped from disk and used as it is. FLUX.2 has BFL names in it.

    <layer>.weight        u8 [n, K]      codes, byte layout of codec.py (n byte rows of N rows)
    <layer>.weight_scale  bf16, fp16 or fp32 [N, K / g]: the narrowest that is exact
    <layer>.weight_zero   like weight_scale; only schemes affine and zero_point (packed_weight.py has the formulas)
    <layer>.weight_up     bf16, fp16 or fp32 [N, r], version 2: with weight_down [r, K] the layer's low-rank residual;
    <layer>.weight_down   up down is added to the values of the codes
    anything else         a dense tensor as it was in the source

`__metadata__["bonsai"]` is JSON:

    {"version": 1, "variant": "ternary", "architecture": "flux2", "packer": "bonsai-image 0.1.0",
     "source": {"file": "...", "sha256": "..."},
     "layers": {"<layer>": {"scheme": "ternary", "codec": "trit5", "group_size": 128, "shape": [N, K]}, ..}}

Scheme, codec and group size may differ from layer to layer (variant "mixed"). Version 2 is written where version 1 does
not suffice: for the codec byte, for a residual ("rank": r in the layer's description) and for a model that is no
Bonsai. There "architecture" is the name of ComfyUI's model configuration, keys are as ComfyUI names the weights of its
transformer or UNet, and "model" holds that configuration: {"class", "model_type", "unet_config", "sampling_settings"},
plain values.

What ComfyUI's own nodes save (a model, a text encoder, or both and more in one checkpoint) has that JSON in a tensor

    <prefix>bonsai.record  u8 [bytes]    describes the layers <prefix><layer>; architecture "qwen3": the text encoder

and no other record counts, for ComfyUI lets a workflow write any metadata. A file without a record (earlier versions
saved so by ModelSave) is read too: N, K and g follow from the shapes, the codec from n and, where n fits both codecs of
ternary weights, from the bytes. Keys may carry the prefix `model.diffusion_model.`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import codec as codecs
from ..errors import PackError
from ..new_file import new_file
from ..packed_weight import FORM, SCHEMES, TABLE_DTYPES, TABLES, PackedWeight
from ..rotation import require_no_mark
from .entries import DOWNLOAD_AGAIN, Entry, Pack, PackedTensor
from .native_record import RECORD, RECORD_TENSOR, NativeRecord, read_records
from .safetensors_file import DTYPES, SafetensorsFile

NAME = "native"
FILE = SafetensorsFile
PLACES = {"transformer": (), "text_encoder": ()}
NEWER_CODECS = ("byte",)
"""Codecs that a reader of version 1 does not know."""
TEXT_ENCODER = "qwen3"
"""Architecture of a text encoder's record."""
WRITE_BYTES = 16 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def claims(file: SafetensorsFile) -> bool:
    """True if a record is there (no other program's entry of that name) or some u8 weight has a `weight_scale`."""
    return '"layers"' in file.metadata.get(RECORD, "") or any(
        name.endswith(RECORD_TENSOR)
        or (dtype == torch.uint8 and name.endswith(".weight") and f"{name}_scale" in file.tensors)
        for name, (_, dtype) in file.tensors.items()
    )


def read(file: SafetensorsFile) -> Pack:
    """Every tensor; packed layers are keyed `<layer>.weight`. Raises PackError where record and tensors disagree."""
    records = read_records(file)
    described = {prefix + layer: told for prefix, record in records.items() for layer, told in record.layers.items()}
    ours = set(described) if any(prefix + RECORD_TENSOR in file.tensors for prefix in records) else None
    entries: dict[str, Entry] = {}
    for name in file.tensors:
        weight = name.rpartition("_")[0] if name.endswith(tuple(f".weight_{table}" for table in TABLES)) else name
        layer = weight.removesuffix(".weight")
        if name.endswith(RECORD_TENSOR):
            continue
        if ours is not None and layer not in ours:  # of another part of a checkpoint, in any format
            entries[name] = file.dense(name)
        elif weight != name:
            if weight not in file.tensors:
                raise file.error("stands alone", f"Expected the codes {weight}. {DOWNLOAD_AGAIN}", name)
        elif name.endswith(".weight") and f"{name}_scale" in file.tensors:
            entries[name] = _packed(file, layer, described.pop(layer, None))
        else:
            entries[name] = file.dense(name)
    if described:
        layer = next(iter(described))
        raise file.error("is missing", f"The file's record describes it. {DOWNLOAD_AGAIN}", f"{layer}.weight")
    pack = Pack(file.path, NAME, entries)
    for prefix, record in records.items():
        if record.architecture != TEXT_ENCODER:
            told = (record.source, record.architecture, record.model)
            pack = Pack(file.path, NAME, entries, None, *told, recorded=True, prefix=prefix)
    return pack


def _packed(file: SafetensorsFile, layer: str, described: Mapping | None) -> PackedTensor:
    weight, scale, zero = f"{layer}.weight", f"{layer}.weight_scale", f"{layer}.weight_zero"
    (code_shape, code_dtype), (table, table_dtype) = file.tensors[weight], file.tensors[scale]
    has_zero = zero in file.tensors
    if code_dtype != torch.uint8 or len(code_shape) != 2:
        raise file.error(f"is {code_dtype} {list(code_shape)}", "Expected u8 codes [n, K].", weight)
    if len(table) != 2 or table_dtype not in TABLE_DTYPES or not table[1] or code_shape[1] % table[1]:
        raise file.error(
            f"is {table_dtype} {list(table)}",
            f"Expected bf16, fp16 or fp32 [N, K / g] with K = {code_shape[1]}.",
            scale,
        )
    shape, group_size = (table[0], code_shape[1]), code_shape[1] // table[1]
    if not group_size or group_size % 32:
        raise file.error(f"has groups of {group_size} columns", f"Expected a multiple of 32. {DOWNLOAD_AGAIN}", scale)
    if described is None:
        scheme, codec = _guess(file, weight, shape[0], code_shape[0], has_zero)
    else:
        try:
            scheme, codec = described["scheme"], described["codec"]
            told = (tuple(described["shape"]), described["group_size"])
        except (KeyError, TypeError) as error:
            raise file.error(f"is described by {described!r}", DOWNLOAD_AGAIN, weight) from error
        if told != (shape, group_size) or str(scheme) not in SCHEMES or codec not in SCHEMES[scheme].codecs:
            raise file.error(
                f"is {shape} in groups of {group_size} by its tensors, but {scheme} {codec} "
                f"{told[0]} in groups of {told[1]} by the record",
                DOWNLOAD_AGAIN,
                weight,
            )
    if has_zero != SCHEMES[scheme].has_zero or codecs.get_codec(codec).byte_rows(shape[0]) != code_shape[0]:
        raise file.error(
            f"has {code_shape[0]} byte rows {'with' if has_zero else 'without'} a zero table",
            f"Expected {codecs.get_codec(codec).byte_rows(shape[0])} for {scheme} {codec}. {DOWNLOAD_AGAIN}",
            weight,
        )

    if has_zero and (file.tensors[zero][0] != table or file.tensors[zero][1] not in TABLE_DTYPES):
        raise file.error(
            f"is {file.tensors[zero][1]} {list(file.tensors[zero][0])}",
            f"Expected bf16, fp16 or fp32 {list(table)} like the scale. {DOWNLOAD_AGAIN}",
            zero,
        )

    residual = _residual(file, weight, shape, 0 if described is None else described.get("rank", 0))

    def load() -> PackedWeight:
        up, down = (file.get(name) for name in residual) if residual else (None, None)
        table, codes = file.get(zero) if has_zero else None, file.get(weight)
        radix = SCHEMES[scheme].levels or codecs.get_codec(codec).radix
        if not codecs.holds(codec, radix, codes):
            raise file.error(f"holds bytes that are no codes of a {scheme} {codec} weight", DOWNLOAD_AGAIN, weight)
        return PackedWeight(codes, file.get(scale), shape, scheme, codec, group_size, table, up, down)

    return PackedTensor(file.path, weight, shape, load)


def _residual(file: SafetensorsFile, weight: str, shape: tuple[int, int], rank: int) -> tuple[str, str] | None:
    """The names of a layer's low-rank matrices, None without. Raises PackError if they do not fit record and weight."""
    names = (f"{weight}_up", f"{weight}_down")
    if not rank and not any(name in file.tensors for name in names):
        return None
    for name, is_up in zip(names, (True, False), strict=True):
        found, dtype = file.tensors.get(name, ((), None))
        rank = rank or (found[-1 if is_up else 0] if len(found) == 2 else 0)
        expected = (shape[0], rank) if is_up else (rank, shape[1])
        if found != expected or dtype not in TABLE_DTYPES:
            raise file.error(
                f"is {dtype} {list(found)}" if dtype else "is missing",
                f"Expected bf16, fp16 or fp32 {list(expected)}, a low-rank residual. {DOWNLOAD_AGAIN}",
                name,
            )
    return names


def _guess(file: SafetensorsFile, weight: str, rows: int, byte_rows: int, has_zero: bool) -> tuple[str, str]:
    """(scheme, codec) from the number of byte rows, for a file without a record."""
    schemes = ("affine",) if has_zero else ("binary", "ternary")
    fitting = [
        (scheme, codec)
        for scheme in schemes
        for codec in SCHEMES[scheme].codecs
        if codecs.get_codec(codec).byte_rows(rows) == byte_rows
    ]
    ternary = [codec for scheme, codec in fitting if scheme == "ternary"]
    if len(ternary) > 1:  # so few rows that five and four to a byte take the same: the bytes tell
        told = [codec for codec in ternary if codecs.holds(codec, 3, file.get(weight))][:1]
        fitting = [found for found in fitting if found[0] != "ternary"] + [("ternary", codec) for codec in told]
    if len(fitting) != 1:
        raise file.error(
            f"has {byte_rows} byte rows for {rows} rows, which fits {len(fitting)} codecs",
            'Save the model with "Save Bonsai Model", which records the codec.',
            weight,
        )
    return fitting[0]


def make_record(
    weights: Mapping[str, PackedWeight | torch.Tensor],
    source: Mapping[str, str] | None = None,
    architecture: str = "flux2",
    model: Mapping[str, object] | None = None,
) -> NativeRecord:
    """The record of a file that will hold `weights` ({name: packed or dense}). model: its configuration, plain values.

    Its version is the lowest that can describe them.
    """
    packed = {name.removesuffix(".weight"): w for name, w in weights.items() if isinstance(w, PackedWeight)}
    schemes = {w.scheme for w in packed.values()}
    variant = schemes.pop() if len(schemes) == 1 else "mixed"
    layers = {
        layer: {name: getattr(w, name) for name in FORM}
        | {"shape": list(w.shape)}
        | ({"rank": w.rank} if w.rank else {})
        for layer, w in packed.items()
    }
    newer = architecture != "flux2" or any(w.rank or w.codec in NEWER_CODECS for w in packed.values())
    version = 2 if newer else 1
    return NativeRecord(variant, layers, source or {}, architecture, version, model=model or {})


def to_tensors(weights: Mapping[str, PackedWeight | torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name in the file: tensor} of packed and dense weights."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, PackedWeight):
            tensors[name] = weight.codes
            tensors |= {f"{name}_{table}": tensor for table, tensor in weight.tables().items()}
        else:
            tensors[name] = weight
    return tensors


def join_metadata(own: Mapping[str, str], foreign: Mapping[str, object]) -> dict[str, str]:
    """`own` and what others want to have said, as text: JSON for values that are none.

    A foreign entry of a name that is taken goes under that name with "_" behind it.
    """
    joined = dict(own)
    for name, value in foreign.items():
        name = _storable(str(name))
        while name in joined:
            name += "_"
        joined[name] = _storable(value if isinstance(value, str) else json.dumps(value, default=str))
    return joined


def _storable(text: str) -> str:
    """`text` without halves of surrogate pairs, which no reader of safetensors takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _unreadable(path: Path, check: Callable[[Pack], object] | None) -> str | None:
    """Why a native file cannot be used, None if it can. The file is closed again: Windows renames no open one."""
    try:
        file = SafetensorsFile(path)
        require_no_mark(file)
        pack = read(file)
        if check is not None:
            check(pack)
    except PackError as error:
        return error.reason
    return None


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """(the header of a safetensors file that holds them in this order, padded to 64 bytes; bytes of its data)."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-(8 + len(raw)) % 64), offset


def write(
    path: Path,
    weights: Mapping[str, PackedWeight | torch.Tensor],
    record: NativeRecord,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    extra: Mapping[str, object] | None = None,
    check: Callable[[Pack], object] | None = None,
) -> None:
    """Writes a native file under a temporary name and renames it (new_file.py): `path` is complete or absent.

    extra: further metadata (ComfyUI's prompt and workflow), see join_metadata. progress(bytes done, bytes in all) is
    called between pieces; what it raises (a cancel) ends the writing. check(what was written, opened again) raises
    PackError if a loader would. Whatever goes wrong, nothing is left behind.
    Raises PackError if `path` exists and not `overwrite`, if the disk has no room, if nothing may be written there or
    if what was written cannot be read; OSError from the disk.
    """
    tensors = to_tensors(weights)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    described = join_metadata({"format": "pt", RECORD: record.to_json()}, extra or {})
    raw, offset = _header({name: tensors[name] for name in order}, described)
    with new_file(path, 8 + len(raw) + offset, overwrite) as (out, temporary):
        out.write(len(raw).to_bytes(8, "little") + raw)
        done = 0
        for name in order:
            data = tensors[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            for lo in range(0, data.size, WRITE_BYTES):
                piece = data[lo : lo + WRITE_BYTES]
                out.write(piece.data)
                done += piece.size
                if progress is not None:
                    progress(done, offset)
        out.flush()
        os.fsync(out.fileno())
        out.close()
        if (fault := _unreadable(temporary, check)) is not None:
            raise PackError(
                path, f"was not written, for it could not be read again ({fault})", "Report it to bonsai-image."
            )
