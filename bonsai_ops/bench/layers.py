"""Every linear layer shape of the 4B model: packed against dense, in one run, in turns."""

from __future__ import annotations

import torch

from .. import codec, dispatch
from ..backends import cpu
from ..packed_weight import SCHEMES, PackedWeight
from .report import show_table, time_in_turns

SHAPES = ((3072, 3072), (3072, 9216), (3072, 18432), (3072, 27648), (9216, 3072), (12288, 3072))
"""(K, N) of qkv, proj, mlp in and out of the double blocks and linear1, linear2 of the single blocks."""
GROUP_SIZE = 128
CHECKED_ROWS = 64


def random_weight(scheme: str, rows: int, columns: int) -> PackedWeight:
    """Random codes and bf16 scales around 1 / sqrt(columns)."""
    name = SCHEMES[scheme][0]
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, codec.get_codec(name).radix, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = ((torch.rand(rows, columns // GROUP_SIZE, generator=generator) + 0.5) / columns**0.5).bfloat16()
    return PackedWeight(codec.encode(name, codes), scale, (rows, columns), scheme, name, GROUP_SIZE)


def measure(tokens: int) -> list[dict]:
    """Prints the table and returns a row a shape: "<path>_vs_bf16" is the dense bf16 time over the path's time.

    Paths: trit5 and bit (ours), unpack (the whole layer unpacked at each call, as GGUF loaders do), fp32 (dense,
    stock ComfyUI's format on CPUs). error: largest difference of the ternary product from float64, relative to the
    largest value. scratch_bytes: bound on what our path allocates beside its result.
    """
    rows = []
    for columns, n in SHAPES:
        ternary, binary = (random_weight(scheme, n, columns) for scheme in ("ternary", "binary"))
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        dense = ternary.dequantize(torch.bfloat16)
        wide, x_wide = dense.float(), x.float()
        runs = {
            "bf16": lambda x=x, w=dense: torch.nn.functional.linear(x, w),
            "trit5": lambda x=x, w=ternary: dispatch.linear(x, w),
            "bit": lambda x=x, w=binary: dispatch.linear(x, w),
            "unpack": lambda x=x, w=ternary: torch.nn.functional.linear(x, w.dequantize(torch.bfloat16)),
            "fp32": lambda x=x_wide, w=wide: torch.nn.functional.linear(x, w),
        }
        seconds = time_in_turns(runs)
        truth = x[:CHECKED_ROWS].double() @ dense.double().t()
        error = float((dispatch.linear(x[:CHECKED_ROWS], ternary).double() - truth).abs().max() / truth.abs().max())
        row = {"m": tokens, "k": columns, "n": n, "bf16_s": seconds["bf16"]}
        row |= {f"{name}_vs_bf16": seconds["bf16"] / seconds[name] for name in runs if name != "bf16"}
        row |= {"planes_vs_bf16": None, "a8_vs_bf16": None, "error": error, "scratch_bytes": cpu.SCRATCH_BYTES}
        rows.append(row)
    call = dispatch.call_of(x.device, x.dtype, ternary)
    backend, declined = dispatch.choose(call)
    print(f"linear layers, {tokens} tokens, backend {backend.name} {declined or ''}; speed relative to dense bf16")
    names = ("m", "k", "n", "bf16_s", "trit5_vs_bf16", "bit_vs_bf16", "unpack_vs_bf16", "fp32_vs_bf16")
    show_table(names, [[row[name] for name in names] for row in rows])
    return rows
