"""gemlite packs: `transformer-gemlite-int1/state_dict.pt` and `transformer-gemlite-int2/state_dict.pt`.

One pickled flat dict (zip format) of tensors. For each quantized layer (N, K) with b = 1 or 2 bits, e = 8 / b codes a
byte, group size g = 128, diffusers names, no `.weight` in them:

    <layer>.W_q         u8     [K / e, N]   code[n, k] = (W_q[k // e, n] >> (b (k % e))) & (2^b - 1)
    <layer>.scales      fp32   [K / g, N]
    <layer>.zeros       fp32   [K / g, N]
    <layer>.metadata    i32    [12]         [1] = b, [2] = g, [10] = 4 (W_group_mode); the rest is not needed
    <layer>.orig_shape  i32    [2]          N, K

    w[n, k] = code[n, k] * scales[k // g, n] + zeros[k // g, n]            in float32, rounded once

zeros is -scales in a ternary pack and -scales / 2 in a binary one. Dense tensors are `<layer>.weight`, BF16. The shape
always comes from orig_shape: the codes of a (3072, 12288) layer look like a square weight.
"""

from __future__ import annotations

import torch

from ..codec import spread_fields
from .entries import FLOATS, CodedTensor, DenseTensor, Entry, Pack
from .torch_file import TorchFile

NAME = "gemlite"
FILE = TorchFile
PLACES = {"transformer": ("transformer-gemlite-int2/state_dict.pt", "transformer-gemlite-int1/state_dict.pt")}
LEAVES = {
    "W_q": (torch.uint8,),
    "scales": (torch.float32, torch.float16, torch.bfloat16),
    "zeros": (torch.float32, torch.float16, torch.bfloat16),
    "metadata": (torch.int32,),
    "orig_shape": (torch.int32, torch.int64),
}
W_GROUP_MODE_FMA = 4
AS_PUBLISHED = "Use state_dict.pt as it was published."


def claims(file: TorchFile) -> bool:
    """Any torch file that is no text encoder's."""
    return True


def read(file: TorchFile) -> Pack:
    """Every tensor; packed layers are keyed `<layer>.weight` like dense ones."""
    content = file.content
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise file.error(f"is a {type(value).__name__}", "Expected nothing but tensors. " + AS_PUBLISHED, str(key))
    entries: dict[str, Entry] = {}
    for key, tensor in content.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in LEAVES:
            if leaf == "W_q":
                entries[f"{layer}.weight"] = _coded(file, layer)
            elif f"{layer}.W_q" not in content:
                raise file.error("stands alone", f"Expected {layer}.W_q beside it. {AS_PUBLISHED}", key)
        elif leaf == "weight" and f"{layer}.W_q" in content:
            raise file.error(f"stands beside {layer}.W_q", f"A layer is dense or packed. {AS_PUBLISHED}", key)
        elif leaf == "weight" and tensor.dtype in FLOATS:
            entries[key] = DenseTensor(file.path, key, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)
        else:
            raise file.error(
                f"is {tensor.dtype} {list(tensor.shape)}",
                f"Expected a 16-bit .weight or one of {', '.join(LEAVES)}. {AS_PUBLISHED}",
                key,
            )
    return Pack(file.path, NAME, entries)


def _coded(file: TorchFile, layer: str) -> CodedTensor:
    content, leaves = file.content, {}
    for leaf, dtypes in LEAVES.items():
        key = f"{layer}.{leaf}"
        if key not in content:
            raise file.error("is missing", f"Every packed layer has {', '.join(LEAVES)}. {AS_PUBLISHED}", key)
        if content[key].dtype not in dtypes:
            raise file.error(f"is {content[key].dtype}", f"Expected {dtypes[0]}. {AS_PUBLISHED}", key)
        leaves[leaf] = content[key]
    metadata, orig_shape = leaves["metadata"].flatten(), leaves["orig_shape"].flatten()
    for leaf, values, least in (("metadata", metadata, 11), ("orig_shape", orig_shape, 2)):
        if values.numel() < least:
            expected = f"Expected {12 if leaf == 'metadata' else 2}. {AS_PUBLISHED}"
            raise file.error(f"has {values.numel()} values", expected, f"{layer}.{leaf}")
    bits, group_size, mode = int(metadata[1]), int(metadata[2]), int(metadata[10])
    if bits not in (1, 2) or group_size < 32 or group_size % 32 or mode != W_GROUP_MODE_FMA:
        raise file.error(
            f"says {bits} bits, group size {group_size}, W_group_mode {mode}",
            f"Expected 1 or 2 bits, a multiple of 32 and mode {W_GROUP_MODE_FMA} (zeros added after the "
            f"scale). {AS_PUBLISHED}",
            f"{layer}.metadata",
        )
    rows, columns = (int(v) for v in orig_shape[:2])
    per_byte = 8 // bits
    if rows < 1 or columns < group_size or columns % group_size:
        raise file.error(
            f"says {rows} x {columns}",
            f"Expected columns in groups of {group_size}. {AS_PUBLISHED}",
            f"{layer}.orig_shape",
        )
    for leaf, shape in (
        ("W_q", (columns // per_byte, rows)),
        ("scales", (columns // group_size, rows)),
        ("zeros", (columns // group_size, rows)),
    ):
        if tuple(leaves[leaf].shape) != shape:
            raise file.error(
                f"has shape {list(leaves[leaf].shape)}",
                f"Expected {list(shape)} for a layer of {rows} x {columns}. {AS_PUBLISHED}",
                f"{layer}.{leaf}",
            )
    words = leaves["W_q"]
    return CodedTensor(
        file.path,
        f"{layer}.weight",
        (rows, columns),
        bits,
        group_size,
        lambda: (leaves["scales"].t(), leaves["zeros"].t()),
        lambda lo, hi: spread_fields(words[:, lo:hi].t(), bits),
    )
