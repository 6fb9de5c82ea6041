"""Compile every kernel we ship for every target, without a GPU, and count what the compiler made of it.

    spills      register spills: local-memory instructions (NVIDIA), spilled registers (AMD)
    smem        shared memory of a block, bytes
    registers   registers a thread
    mma         the tensor-core instructions in the code
    ovh         instructions of the main loop that are not tensor-core ones, per 2048 multiply-adds (one HMMA.16816)
    mmas        of them in an iteration of the main loop
    flight, bars, use, ahead   what that loop waits for: in_flight, barriers, distance and ahead of static_loop.py

All are blind to occupancy, bank conflicts and DRAM: they compare kernels, they predict no time. gemlite's kernel
(2 bits for ternary, 1 for binary; the better of GEMLITE_BLOCKS) is compiled and counted the same way, where gemlite is
installed; beside a8 too it is the one with 16-bit activations, which the published packs run. At the end: what is
unpacked where no such kernel runs, by torch's operators (traffic.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...kernels.triton import configs
from . import static_loop, static_unpack, traffic
from .disassembly import compile_kernel, disassembled, label, opcode
from .gemlite_import import import_gemlite

TARGETS: tuple[int | str, ...] = (80, 86, 87, 89, 90, 100, 120, "gfx1100", "gfx1201", "gfx942")
DTYPES = ("fp16", "bf16")
SMEM_LIMIT = 99 << 10
SMEM_LIMIT_LARGE = 227 << 10
"""Of sm_90 and sm_100."""
SMEM_LIMIT_AMD = 64 << 10
OVERHEAD_LIMITS = {
    # (codec, mode, dtype): (sm_80 .. sm_120, sm_90)
    **{(codec, "exact", dtype): (3.9, 1.4) for codec in ("bit", "crumb") for dtype in DTYPES},
    ("trit5", "exact", "fp16"): (4.2, 1.65),
    ("trit5", "exact", "bf16"): (4.9, 1.65),
    ("bit", "a8", "bf16"): (2.1, 2.1),
    ("crumb", "a8", "bf16"): (2.1, 2.1),
    ("bit", "a8_fp8", "bf16"): (2.6, 2.2),
    ("crumb", "a8_fp8", "bf16"): (2.6, 2.2),
}
PLANE_OVERHEAD_LIMITS = {"trit5": (1.85, 3.5), "crumb": (1.6, 2.9), "bit": (1.45, 2.75)}
"""Of the wide and the narrow tile of plane_kernel; an H100 has four slots."""
PLANE_PRODUCTS = 4
"""Tensor-core instructions of one tl.dot over 64 columns."""
WAITS = {
    # (family, mode): most barriers, fewest products in flight, instructions from load to use and iterations ahead
    ("registers", "exact"): (2, None, 30, 0),
    ("registers", "fp16_accumulate"): (2, None, 100, 0),
    ("registers", "a8"): (3, None, 0, 0),
    ("registers", "a8_fp8"): (2, None, 70, 0),
    ("sm_90", "plane"): (2, 1, 40, 2),
    ("sm_90", "exact"): (11, 0, 0, 0),
    ("sm_90", "a8"): (3, None, 0, 0),
    ("sm_90", "a8_fp8"): (2, 0, 70, 1),
    ("sm_100", "plane"): (4, 1, 30, 2),
    ("sm_100", "exact"): (12, 1, 0, 0),
    ("sm_100", "a8"): (3, None, 0, 0),
    ("sm_100", "a8_fp8"): (5, 0, 100, 1),
    ("amd", "exact"): (10, None, 0, None),
    ("amd", "a8"): (4, None, 0, None),
}
"""What the main loops may wait for; None where there is nothing of the kind."""
NAMES = {"trit5": "ternary_trit5", "crumb": "ternary_2bit", "bit": "binary_1bit"}
"""Codec -> how the report calls its kernels."""
GEMLITE_BLOCKS = ((64, 128, 64, 4, 2), (128, 128, 64, 8, 2))
"""BLOCK_SIZE_M, _N, _K, warps, stages of gemlite's kernel: among the commonest in its cached choices."""

_NVIDIA_MMA = re.compile(r"(?:H|I|Q|HG|IG|QG)MMA|UTC\w*MMA")
_AMD_MMA = re.compile(r"v_(?:wmma|mfma)\w+")


@dataclass(frozen=True)
class Row:
    """One compiled kernel. `ovh_per_hmma` and `gemlite_ovh_per_hmma`: see the module; None where not measured. What
    follows: see static_loop.py. mode: "plane" is plane_kernel, which computes in mode exact."""

    name: str
    mode: str
    target: str
    spills: int
    smem: int
    registers: int
    mma: list[str]
    ovh_per_hmma: float | None
    gemlite_ovh_per_hmma: float | None = None
    products: int = 0
    in_flight: int | None = None
    barriers: int = 0
    distance: int | None = None
    ahead: float | None = None
    overwritten: int = 0

    @property
    def codec(self) -> str:
        return next(codec for codec, name in NAMES.items() if self.name.startswith(name))

    @property
    def dtype(self) -> str:
        return self.name.rsplit("_", 1)[1]

    def failures(self) -> list[str]:
        """The gates this kernel misses, one sentence each."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        small = SMEM_LIMIT if self.target[0] == "s" else SMEM_LIMIT_AMD
        limit = SMEM_LIMIT_LARGE if self.target in ("sm_90", "sm_100") else small
        if self.smem > limit:
            found.append(f"{self.smem} bytes of shared memory, limit {limit}")
        if not self.mma:
            found.append("no tensor-core instruction")
        allowed = self._most_overhead()
        if allowed is not None and (self.ovh_per_hmma is None or self.ovh_per_hmma > allowed):
            found.append(f"{self.ovh_per_hmma} other instructions per HMMA, limit {allowed}")
        return [*found, *self._waits_missed()]

    def _most_overhead(self) -> float | None:
        if not self.target.startswith("sm_"):
            return None
        if self.mode == "plane":
            return PLANE_OVERHEAD_LIMITS[self.codec]["narrow" in self.name]
        limits = OVERHEAD_LIMITS.get((self.codec, self.mode, self.dtype))
        return None if limits is None else limits[self.target == "sm_90"]

    def _waits_missed(self) -> list[str]:
        target = int(self.target[3:]) if self.target.startswith("sm_") else self.target
        barriers, *least = WAITS[configs.family(target), self.mode]
        found = [f"{self.barriers} barriers an iteration, limit {barriers}"] if self.barriers > barriers else []
        if self.mode == "plane" and self.products != PLANE_PRODUCTS:
            found.append(f"{self.products} tensor-core instructions an iteration, expected {PLANE_PRODUCTS}")
        if self.overwritten:
            found.append(f"{self.overwritten} registers are overwritten while a product reads them")
        names = {
            "in_flight": "products in flight at a wait",
            "distance": "instructions from a load to its use",
            "ahead": "iterations between a copy and its use",
        }
        for (name, text), wanted in zip(names.items(), least, strict=True):
            measured = getattr(self, name)
            if wanted is not None and (measured is None or measured < wanted):
                found.append(f"{measured} {text}, expected {wanted}")
        return found


def shipped(target: int | str) -> Iterator[tuple[str, str, str]]:
    """(codec, mode, dtype) of each kernel that a user of this target can run.

    In the modes a8 and a8_fp8 only the last store knows the output's dtype: one stands for both.
    """
    for codec in NAMES:
        for mode in configs.modes(target):
            if (configs.family(target), codec, mode) in configs.CONFIGS:
                for dtype in {"fp16_accumulate": ("fp16",), **dict.fromkeys(configs.ROUNDED, ("bf16",))}.get(
                    mode, DTYPES
                ):
                    yield codec, mode, dtype


def planes(target: int | str) -> Iterator[tuple[str, str, int]]:
    """(codec, dtype, 0 for the wide tile or 1 for the narrow one) of each plane_kernel that a user can run."""
    for codec in NAMES:
        for tile in range(len(configs.PLANE_TILES.get(configs.family(target), ()))):
            for dtype in DTYPES:
                yield codec, dtype, tile


@cache
def measure_plane(target: int, codec: str, dtype: str, tile: int) -> Row:
    """Compiles plane_kernel by the ptxas that runs it and counts. Arguments as `planes` yields them."""
    from ...kernels.triton import assembler, plane

    config = configs.PLANE_TILES[configs.family(target)][tile]
    types = {"codes_ptr": "*u8", "scale_ptr": "*bf16", "x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    aligned = {*types, "N", "K", "stride_xm", "stride_ym"}
    types |= dict.fromkeys(("M", "N", "K", "n8", "stride_xm", "stride_ym"), "i32")
    options = {"num_warps": config.warps, "num_stages": config.stages}
    constants = configs.constants(config, codec, "exact", bias=False)
    with assembler.of(config):
        compiled = compile_kernel(plane.plane_kernel, types, constants, aligned, target, **options)
    assembler.check(compiled, config)
    macs = config.block_m * config.block_n * config.block_k
    counted = _count(compiled, target, macs / config.warps / 2048)
    name = f"{NAMES[codec]}_plane_{('wide', 'narrow')[tile]}_{dtype}"
    return Row(name=name, mode="plane", target=label(target), **counted)


@cache
def measure(target: int | str, codec: str, mode: str, dtype: str) -> Row:
    """Compiles one shipped kernel and counts. Bias is compiled in; it is outside of the loop that is counted."""
    from ...kernels.triton import fp8, half, int8

    config = configs.CONFIGS[configs.family(target), codec, mode]
    constants = configs.constants(config, codec, mode, bias=True)
    words = config.weight_first and config.asm and mode not in configs.ROUNDED
    types = {
        "codes_ptr": "*i16" if words else "*u8",
        "scale_ptr": "*bf16",
        "tokens_ptr": "*fp32",
        "y_ptr": f"*{dtype}",
    }
    if mode in configs.ROUNDED:
        kernel, macs = int8.a8_kernel, config.block_m * config.block_n * configs.GROUP
        types |= {"q_ptr": "*i8", "bias_ptr": "*bf16"}
        if mode == "a8_fp8":
            kernel, types["q_ptr"] = fp8.fp8_kernel, "*fp8e4nv"
    else:
        kernel = half.weight_first_kernel if config.weight_first else half.input_first_kernel
        macs = config.block_m * config.block_n * config.block_k * constants["PLANES"]
        types["x_ptr"] = f"*{dtype}"
    aligned = {*types, "N", "K", "stride_xm", "stride_ym"}
    types |= {name: "i32" for name in ("M", "N", "K", "n8", "stride_xm", "stride_ym") if name in kernel.arg_names}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = compile_kernel(kernel, types, constants, aligned, target, **options)
    counted = _count(compiled, target, macs / config.warps / 2048)
    return Row(name=f"{NAMES[codec]}_{mode}_{dtype}", mode=mode, target=label(target), **counted)


def _count(compiled: Any, target: int | str, hmma: float) -> dict:
    """All columns of Row that are counted. `hmma`: HMMA.16816 a warp does in one iteration."""
    usage, instructions, loops = disassembled(compiled, target)
    pattern = _AMD_MMA if isinstance(target, str) else _NVIDIA_MMA
    kinds = sorted({opcode(text) for text in instructions if pattern.match(opcode(text))})
    found: dict = {"ovh_per_hmma": None}
    if loops and kinds:
        counted = [sum(pattern.match(opcode(text)) is not None for text in loop) for loop in loops]
        products, main = max(zip(counted, loops, strict=True), key=lambda pair: (pair[0], -len(pair[1])))
        if products:
            found |= {"products": products, "ovh_per_hmma": round((len(main) - products) / hmma, 2)}
            found |= asdict(static_loop.look_at(main))
    return {**usage, "mma": kinds, **found}


@cache
def _gemlite_kernel() -> Any:
    """gemlite's GEMM kernel without its autotuner, or None where gemlite is not installed."""
    if importlib.util.find_spec("gemlite") is None:
        return None
    import_gemlite()
    from gemlite.triton_kernels.gemm_kernels import gemm_INT_kernel as kernel

    while hasattr(kernel, "fn") and not hasattr(kernel, "arg_names_for_ir") and "JIT" not in type(kernel).__name__:
        kernel = kernel.fn
    return kernel


@cache
def gemlite_overhead(target: int | str, bits: int, dtype: str) -> float | None:
    """ovh of gemlite's kernel at K 3072, N 9216, groups of 128; None on AMD and without gemlite."""
    kernel = None if isinstance(target, str) else _gemlite_kernel()
    if kernel is None:
        return None
    import triton.language as tl

    element = {"fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    types = dict.fromkeys(("a_ptr", "c_ptr", "scales_ptr", "zeros_ptr"), f"*{dtype}")
    types |= {"b_ptr": "*u8"}
    aligned = {*types, "stride_am", "stride_bk", "stride_cm", "stride_meta_g"}
    types |= dict.fromkeys(("M", "M_CLOSEST", "stride_am", "stride_bk", "stride_cm", "stride_meta_g"), "i32")
    found = []
    for block_m, block_n, block_k, warps, stages in GEMLITE_BLOCKS:
        given = {
            "N": 9216,
            "K": 3072,
            "W_nbits": bits,
            "group_size": 128,
            "unpack_mask": 2**bits - 1,
            "elements_per_sample": 8 // bits,
            "type_id": 0,
            "a_sizeof": 2,
            "b_sizeof": 1,
            "input_dtype": element,
            "output_dtype": element,
            "acc_dtype": tl.float32,
            "meta_dtype": element,
            "channel_scale_mode": 0,
            "W_group_mode": 4,
            "BLOCK_SIZE_M": block_m,
            "BLOCK_SIZE_N": block_n,
            "BLOCK_SIZE_K": block_k,
            "GROUP_SIZE_M": 8,
            "NUM_STAGES": stages,
            "A_load_order": 0,
            "data_contiguous": False,
            "EVEN_M": True,
            "EVEN_K": True,
            "EVEN_N": True,
            "meta_evict_policy": "evict_last",
            "a_evict": "",
            "b_evict": "evict_first",
            "block_quant_size": 128,
            **dict.fromkeys(("stride_ak", "stride_bn", "stride_cn", "stride_meta_n"), 1),
            **dict.fromkeys(("zero_is_scalar", "use_tma", "use_5d_scales", "warp_specialize"), False),
        }
        constants = {name: given.get(name) for name in kernel.arg_names if name not in types}
        compiled = compile_kernel(kernel, types, constants, aligned, target, num_warps=warps, num_stages=stages)
        counted = _count(compiled, target, block_m * block_n * block_k / 2048 / warps)
        if counted["ovh_per_hmma"] is not None and not counted["spills"]:
            found.append(counted["ovh_per_hmma"])
    return min(found, default=None)


def report(targets: tuple[int | str, ...] = TARGETS, *, gemlite: bool = True) -> Iterator[Row]:
    """A row for every shipped kernel on every target."""
    for target in targets:
        for codec, mode, dtype in shipped(target):
            row = measure(target, codec, mode, dtype)
            peer = gemlite_overhead(target, 1 if codec == "bit" else 2, dtype) if gemlite else None
            yield Row(**{**asdict(row), "gemlite_ovh_per_hmma": peer})
        for codec, dtype, tile in planes(target):
            yield measure_plane(target, codec, dtype, tile)


def run_static(json_path: Path | None = None, targets: tuple[int | str, ...] = TARGETS) -> int:
    """Prints the table, writes it to `json_path`; returns 0, or 1 if a kernel misses a gate or Triton is missing."""
    from ...kernels.triton import backend

    if backend.triton is None:
        print(f"{backend.unavailable()}. The static report compiles Triton kernels.")
        return 1
    columns = (
        "kernel",
        "target",
        "ovh",
        "gemlite",
        "mmas",
        "flight",
        "bars",
        "use",
        "ahead",
        "regs",
        "spills",
        "smem",
        "mma",
    )
    form = "{:34}{:9}{:>6}{:>9}{:>6}{:>8}{:>6}{:>5}{:>7}{:>6}{:>8}{:>8}  {}"
    print(form.format(*columns))
    rows, failed = [], 0
    for row in report(targets):
        rows.append(row)
        figures = (row.ovh_per_hmma, row.gemlite_ovh_per_hmma, row.products)
        figures += (row.in_flight, row.barriers, row.distance, row.ahead)
        shown = ["-" if figure is None else f"{figure:.2f}".rstrip("0").rstrip(".") for figure in figures]
        last = (row.registers, row.spills, row.smem, ", ".join(row.mma))
        print(form.format(row.name, row.target, *shown, *last), flush=True)
        for failure in row.failures():
            failed += 1
            print(f"    misses a gate: {failure}", flush=True)
    unpacking, plain = static_unpack.show((75, *targets)), traffic.show()
    failed += sum(len(row.failures()) for row in (*unpacking, *plain))
    if json_path is not None:
        figures = {
            name: list(map(asdict, of)) for name, of in (("kernels", rows), ("unpack", unpacking), ("plain", plain))
        }
        json_path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 1 if failed else 0
