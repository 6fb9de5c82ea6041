"""The kernels that unpack, compiled without a GPU: what the compilers made of them, and the bytes they move a weight.

compiler                  triton, or nvrtc for the kernel in CUDA C++
spills, smem, registers   as static.py has them; nothing passes through shared memory
steps                     instructions a weight, the whole program counted
stores                    the kinds of store instructions; the widest takes 16 bytes of a thread
bytes                     read and written a weight: codes, tables and the values in 16 bits
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from ...weights.codec import get_codec
from ...weights.packed_weight import SCHEMES
from . import disassembly

KERNELS = {
    # name: scheme, codec, group, dtype
    "unpack_trit5_bf16": ("ternary", "trit5", 128, "bf16"),
    "unpack_crumb_fp16": ("ternary", "crumb", 128, "fp16"),
    "unpack_bit_bf16": ("binary", "bit", 128, "bf16"),
    "unpack_nibble_fp16": ("affine", "nibble", 64, "fp16"),
    "unpack_byte_bf16": ("affine", "byte", 128, "bf16"),
    "unpack_zero_point_bf16": ("zero_point", "nibble", 128, "bf16"),
}
LIMITS = {
    # instructions a weight allowed on NVIDIA GPUs, and on sm_75, which has none that rounds to bf16: triton, nvrtc
    "unpack_trit5_bf16": {"triton": (6.6, 6.6), "nvrtc": (7.8, 8.5)},
    "unpack_crumb_fp16": {"triton": (5.3, 5.3), "nvrtc": (7.4, 7.4)},
    "unpack_bit_bf16": {"triton": (2.8, 2.8), "nvrtc": (4.6, 5.3)},
    "unpack_nibble_fp16": {"triton": (9.3, 10.3), "nvrtc": (13.2, 13.2)},
    "unpack_byte_bf16": {"triton": (8.3, 13.3), "nvrtc": (17.2, 23.3)},
    "unpack_zero_point_bf16": {"triton": (8.3, 13.3), "nvrtc": (13.2, 19.6)},
}
PADDING = ("NOP", "s_nop", "s_code_end")
MOST_BYTES = {"byte": 3.1, "nibble": 2.6}
"""Bytes a weight allowed by codec; all others 2.3."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel: name of KERNELS; columns as the module has them."""

    name: str
    compiler: str
    target: str
    spills: int
    smem: int
    registers: int
    steps: float
    stores: list[str]
    bytes: float

    def failures(self) -> list[str]:
        """The gates this kernel misses, one sentence each."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.smem:
            found.append(f"{self.smem} bytes of shared memory, none expected")
        if len(self.stores) != 1 or not re.search("128|b128|dwordx4", self.stores[0]):
            found.append(f"stores {', '.join(self.stores)}, expected 16 bytes a thread each")
        _, codec, _, _ = KERNELS[self.name]
        most = LIMITS[self.name][self.compiler][self.target == "sm_75"]
        if self.target.startswith("sm_") and self.steps > most:
            found.append(f"{self.steps} instructions a weight, limit {most}")
        if self.bytes > MOST_BYTES.get(codec, 2.3):
            found.append(f"{self.bytes} bytes a weight, limit {MOST_BYTES.get(codec, 2.3)}")
        return found


def moved(scheme: str, codec: str, group: int, itemsize: int = 2, table: int = 2) -> float:
    """Bytes that unpacking reads and writes a weight, with values of `itemsize` and tables of `table` bytes."""
    tables = 2 if SCHEMES[scheme].has_zero else 1
    return round(1 / get_codec(codec).fields + tables * table / group + itemsize, 3)


@cache
def measure(target: int | str, name: str) -> Row:
    """Compiles one kernel of KERNELS with Triton and counts."""
    import torch

    from ...kernels.unpack import by_triton
    from ...kernels.unpack.kernel import unpack_kernel

    scheme, codec, group, dtype = KERNELS[name]
    given = by_triton.constants(scheme, codec, group, {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    types = {"scale_ptr": "*bf16", "zero_ptr": "*bf16", **dict.fromkeys(("K", "n8", "first", "last", "start"), "i32")}
    types |= {"codes_ptr": "*i16", "w_ptr": "*i32"} if given["PAIRS"] else {"codes_ptr": "*u8", "w_ptr": f"*{dtype}"}
    aligned = {"codes_ptr", "scale_ptr", "zero_ptr", "w_ptr", "K"}
    compiled = disassembly.compile_kernel(
        unpack_kernel, types, given, aligned, target, num_warps=by_triton.WARPS, enable_fp_fusion=False
    )
    lanes = 64 if isinstance(target, str) and target.startswith("gfx9") else 32
    owned = given["BLOCK_N"] * given["BLOCK_K"] * given["STEPS"] * given["PLANES"] / (by_triton.WARPS * lanes)
    counted = _count(compiled, target, owned)
    return Row(name, "triton", disassembly.label(target), **counted, bytes=moved(scheme, codec, group))


@cache
def measure_nvrtc(target: int, name: str) -> Row:
    """Compiles one kernel of KERNELS with the NVRTC of this PyTorch and counts. Raises OSError where it has none."""
    import torch

    from ...kernels.unpack import by_nvrtc

    scheme, codec, group, dtype = KERNELS[name]
    types = ({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype], torch.bfloat16, torch.bfloat16)
    code = by_nvrtc.compiled(divmod(target, 10), scheme, codec, group, *types)
    compiled = SimpleNamespace(asm={"cubin": code}, metadata=SimpleNamespace(shared=disassembly.shared_memory(code)))
    counted = _count(compiled, target, 16 // types[0].itemsize * get_codec(codec).fields)
    return Row(name, "nvrtc", disassembly.label(target), **counted, bytes=moved(scheme, codec, group))


def _count(compiled: Any, target: int | str, weights: float) -> dict:
    """Spills, shared memory, registers, instructions a weight (a thread makes `weights`) and kinds of stores."""
    usage, instructions, _ = disassembly.disassembled(compiled, target)
    opcodes = [opcode for text in instructions if (opcode := disassembly.opcode(text)) not in PADDING]
    pattern = r"(global|flat|buffer)_store" if isinstance(target, str) else "ST"
    return {
        **usage,
        "steps": round(len(opcodes) / weights, 2),
        "stores": sorted({opcode for opcode in opcodes if re.match(pattern, opcode)}),
    }


def show(targets: tuple[int | str, ...]) -> list[Row]:
    """Prints a row for every kernel on every target that its compiler knows, and returns them."""
    columns = ("kernel", "compiler", "target", "steps", "bytes", "regs", "spills", "smem", "stores")
    print("\n{:25}{:9}{:9}{:>6}{:>9}{:>6}{:>8}{:>8}  {}".format(*columns))
    rows = []
    for target in targets:
        for compile_and_count in (measure, measure_nvrtc) if _nvrtc_knows(target) else (measure,):
            for name in KERNELS:
                rows.append(row := compile_and_count(target, name))
                print(
                    f"{row.name:25}{row.compiler:9}{row.target:9}{row.steps:>6.2f}{row.bytes:>9.3f}{row.registers:>6}"
                    f"{row.spills:>8}{row.smem:>8}  {', '.join(row.stores)}",
                    *(f"\n    misses a gate: {failure}" for failure in row.failures()),
                    sep="",
                    flush=True,
                )
    return rows


def _nvrtc_knows(target: int | str) -> bool:
    """Whether this PyTorch brings an NVRTC that makes machine code for a target."""
    from ...kernels.unpack import nvrtc

    try:
        return not isinstance(target, str) and nvrtc.target(divmod(target, 10)) == (target, True)
    except (OSError, RuntimeError):
        return False
