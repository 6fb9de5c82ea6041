"""HQQ text encoders: `text_encoder-hqq-4bit/qmodel.pt`.

A pickled dict {module name: {leaf: value}}. A quantized module (N, K) has

    W_q      u8 [N K / (2 g), g]   packing "4bit_u8": with R = N K / g groups as rows, the high nibble of byte [r, c] is
                                   the code of row r, the low nibble that of row r + R / 2
    scale    [N K / g, 1]          group r = n (K / g) + k // g, axis 1
    zero     [N K / g, 1]
    nbits 4, group_size g, axis 1, shape (N, K), packing; plain values, or tensors that spell them (strings as bytes)

    w[n, k] = (code[n, k] - zero) * scale          the zero point is subtracted before scaling

Every other module is {"weight": tensor} (embedding, norms). For N a multiple of 16 the bytes are our nibble codec's as
they lie: rows 0 .. N/2 - 1 in the high nibbles, the others in the low ones. Nothing is repacked.
"""

from __future__ import annotations

from typing import Any

import torch

from ..json_file import is_count
from ..packed_weight import TABLE_DTYPES, PackedWeight
from .entries import DenseTensor, Entry, Pack, PackedTensor
from .torch_file import TorchFile

NAME = "hqq"
FILE = TorchFile
FILE_NAME = "qmodel.pt"
PLACES = {"text_encoder": (f"text_encoder-hqq-4bit/{FILE_NAME}",)}
AS_PUBLISHED = "Use qmodel.pt as it was published."
MAX_SPELLED = 64
"""Values of a tensor that spells a plain one."""
PLAIN_TYPES = (bool, int, float, str, type(None), torch.Size, torch.dtype, tuple, list)


def claims(file: TorchFile) -> bool:
    """True if it is called as published or holds a dict for a module."""
    return file.path.name == FILE_NAME or any(isinstance(v, dict) for v in file.content.values())


def read(file: TorchFile) -> Pack:
    """Every tensor, keyed `<module>.<leaf>`. Raises PackError for what HQQ's 4-bit serializer does not write."""
    entries: dict[str, Entry] = {}
    for module, leaves in file.content.items():
        if not isinstance(module, str) or not isinstance(leaves, dict):
            raise file.error(
                f"is a {type(leaves).__name__}", f"Expected a dict of tensors. {AS_PUBLISHED}", str(module)
            )
        for leaf, value in leaves.items():
            if not isinstance(value, (torch.Tensor, *PLAIN_TYPES)):
                raise file.error(
                    f"is a {type(value).__name__}",
                    f"Expected a tensor or a plain value. {AS_PUBLISHED}",
                    f"{module}.{leaf}",
                )
        if "W_q" in leaves:
            entries[f"{module}.weight"] = _packed(file, module, leaves)
        else:
            for leaf, value in leaves.items():
                if isinstance(value, torch.Tensor):
                    name = f"{module}.{leaf}"
                    entries[name] = DenseTensor(file.path, name, tuple(value.shape), value.dtype, lambda v=value: v)
    return Pack(file.path, NAME, entries)


def _plain(file: TorchFile, key: str, value: Any) -> Any:
    """A number, shape or string, also where the serializer spelled it as a tensor. Raises PackError for other ones."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() > MAX_SPELLED or value.ndim > 1 or value.is_complex():
        raise file.error(
            f"is {value.dtype} {list(value.shape)}", f"Expected a number, a shape or a text. {AS_PUBLISHED}", key
        )
    if value.dtype == torch.uint8 and value.ndim == 1:
        return "".join(chr(c) for c in value.tolist())
    return tuple(value.tolist()) if value.ndim else value.item()


def _sizes(file: TorchFile, module: str, leaves: dict) -> tuple[tuple[int, int], int]:
    """((N, K), group size) of a module whose metadata is what is read. Raises PackError."""
    for leaf in ("scale", "zero", "nbits", "group_size", "axis", "shape", "packing"):
        if leaf not in leaves:
            raise file.error("is missing", f"Expected 4-bit HQQ with plain scales. {AS_PUBLISHED}", f"{module}.{leaf}")
    told = {
        leaf: _plain(file, f"{module}.{leaf}", leaves.get(leaf))
        for leaf in ("nbits", "group_size", "axis", "packing", "view_as_float", "quant_scale", "quant_zero", "shape")
    }
    if (
        (told["nbits"], told["axis"], told["packing"]) != (4, 1, "4bit_u8")
        or told["view_as_float"]
        or told["quant_scale"]
        or told["quant_zero"]
    ):
        raise file.error(
            f"says {told}", f"Expected nbits 4, axis 1, packing 4bit_u8 and plain tables. {AS_PUBLISHED}", module
        )
    shape, group_size = told["shape"], told["group_size"]
    if (
        not isinstance(shape, (tuple, list))
        or len(shape) != 2
        or not all(map(is_count, (*shape, group_size)))
        or group_size % 32
        or shape[1] % group_size
        or shape[0] % 16
    ):
        raise file.error(
            f"is {shape} in groups of {group_size}",
            f"Expected rows in sixteens and columns in groups of a multiple of 32. {AS_PUBLISHED}",
            module,
        )
    return (shape[0], shape[1]), group_size


def _packed(file: TorchFile, module: str, leaves: dict) -> PackedTensor:
    key = f"{module}.weight"
    shape, group_size = _sizes(file, module, leaves)
    for leaf, dtypes in (("W_q", (torch.uint8,)), ("scale", TABLE_DTYPES), ("zero", TABLE_DTYPES)):
        value = leaves[leaf]
        if not isinstance(value, torch.Tensor) or value.dtype not in dtypes or not value.is_contiguous():
            found = f"is {value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else "is no tensor"
            expected = f"Expected {', '.join(map(str, dtypes))}, row after row. {AS_PUBLISHED}"
            raise file.error(found, expected, f"{module}.{leaf}")
    words, groups = leaves["W_q"], shape[0] * shape[1] // group_size
    if words.numel() * 2 != shape[0] * shape[1] or any(leaves[leaf].numel() != groups for leaf in ("scale", "zero")):
        raise file.error(
            f"has {words.numel()} bytes of codes and {leaves['scale'].numel()} scales",
            f"Expected {shape[0] * shape[1] // 2} and {groups}. {AS_PUBLISHED}",
            module,
        )

    def load() -> PackedWeight:
        table = (shape[0], shape[1] // group_size)
        return PackedWeight(
            words.view(shape[0] // 2, shape[1]),
            leaves["scale"].view(table),
            shape,
            "zero_point",
            "nibble",
            group_size,
            leaves["zero"].view(table),
        )

    return PackedTensor(file.path, key, shape, load)
