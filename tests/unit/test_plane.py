"""The backend "plane" without a GPU: plane_kernel in Triton's interpreter, its PTX in an emulation, who assembles it.

test_triton.py runs this file in the interpreter too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from interpreted import interpreter, once
from ptx import Ptx, as_floats
from random_weights import random_weight

from bonsai_ops import kernels
from bonsai_ops.kernels import BackendError, Call, dispatch, eager, triton
from bonsai_ops.kernels.triton import assembler, backend, by_plane, configs, probe
from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.packed_weight import PackedWeight

SCHEME = {"trit5": "ternary", "crumb": "ternary", "bit": "binary"}
CALL = Call(torch.device("cuda", 0), torch.bfloat16, 9216, 3072, "ternary", "trit5", 128, (9, 0))

pytestmark = pytest.mark.skipif(backend.half is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def nothing_failed() -> None:
    backend.forget_verified()
    kernels.forget_failures()


@interpreter
@pytest.mark.parametrize(
    ("codec", "dtype", "shape", "tile"),
    [
        # tokens, rows, columns: fewer rows than a byte, ragged planes, several tiles of each kind
        ("trit5", torch.float16, (3, 7, 256), 0),
        ("bit", torch.bfloat16, (5, 83, 384), 0),
        ("crumb", torch.float16, (1, 83, 128), 1),
        ("trit5", torch.bfloat16, (130, 700, 128), 1),
        ("crumb", torch.bfloat16, (260, 600, 128), 0),
        ("bit", torch.float16, (130, 1030, 128), 1),
    ],
)
def test_matches_float64(codec: str, dtype: torch.dtype, shape: tuple[int, int, int], tile: int) -> None:
    """Into the middle of a buffer of NaN: all is written, and nothing beside it."""
    tokens, rows, columns = shape
    weight = random_weight(SCHEME[codec], codec, rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    buffer = torch.full((tokens + 2, rows + 32), float("nan"), dtype=dtype)
    out = buffer[1:-1, 16:-16]
    backend.launch(x, weight, None, out, configs.PLANE_TILES["sm_90"][tile], "exact")
    truth = x.double() @ weight.dequantize(dtype).double().t()
    error = float((out.double() - truth).norm() / truth.norm())
    assert error < {torch.float16: 6e-4, torch.bfloat16: 2**-7}[dtype]  # the interpreter truncates to bf16
    out.fill_(float("nan"))
    assert buffer.isnan().all(), "the kernel wrote outside its output"


@once
@pytest.mark.parametrize("places", [2, 4])
@pytest.mark.parametrize("codec", SCHEME)
def test_ptx_decodes_every_pair_of_bytes(codec: str, places: int) -> None:
    """In each program's plane: the weight, twice it for ternary; for bit, the sign."""
    coder = codecs.get_codec(codec)
    values = torch.arange(256)
    if codec == "trit5":
        values = (torch.arange(243) * 256 / 243).ceil().to(torch.int64)
    low, high = (grid.reshape(-1) for grid in torch.meshgrid(values, values, indexing="ij"))
    keep = torch.ones_like(low, dtype=torch.bool)
    if codec == "crumb":
        keep = sum((byte & byte >> 1 & 0x55) for byte in (low, high)) == 0
    low, high = low[keep], high[keep]
    pairs = [(low, high)] if places == 2 else [(low, high), (high, low)]
    register = sum((a | b << 8) << 16 * i for i, (a, b) in enumerate(pairs))
    register = register | (0xA7A7 << 16 if places == 2 else 0)  # what stands beside a pair does not matter
    text = configs.ASM_PLANE[coder.radix, places]
    for plane in range(coder.fields):
        found = Ptx(text, {1 if places == 2 else 2: register}, torch.tensor(plane)).registers
        for i, pair in enumerate(pairs):
            lanes = found[f"${i}"]
            if codec == "bit":
                lanes = lanes & 0x80008000 ^ 0x3C003C00
            for byte, lane in zip(pair, as_floats(lanes, torch.float16), strict=True):
                code = list(codecs.planes(codec, byte.to(torch.uint8)))[plane].double()
                assert torch.equal(lane.double(), 1 - 2 * code if codec == "bit" else 2 - 2 * code), (plane, i)


@pytest.mark.parametrize(
    ("tokens", "rows", "wide"),
    [(1, 9216, False), (512, 3072, False), (1536, 27648, True), (4608, 18432, True), (1536, 3072, False)],
)
def test_the_tile_with_fewer_rounds(tokens: int, rows: int, wide: bool) -> None:
    """By an H100's 132 multiprocessors; a narrow tile where the wide one leaves most of the last round idle."""
    for family, target in (("sm_90", 90), ("sm_100", 100), ("sm_100", 103)):
        assert configs.plane_tile(target, "trit5", tokens, rows, 132) is configs.PLANE_TILES[family][not wide]


@once
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("codec", SCHEME)
def test_the_self_check_has_several_tiles_and_edges(codec: str, tile: int) -> None:
    chosen, coder = configs.PLANE_TILES["sm_90"][tile], codecs.get_codec(codec)
    weight, x = random_weight(SCHEME[codec], codec, 83, 128), torch.zeros(3, 128)
    inputs, made, _ = probe.make(x, weight, None, chosen)
    n = len(made.codes)
    assert len(inputs) > 2 * chosen.block_m and len(inputs) % chosen.block_m
    assert n > 2 * chosen.block_n and n % chosen.block_n and made.shape[0] % (8 * coder.fields)
    assert made.shape[1] >= 8 * chosen.block_k * (chosen.stages - 2)


@once
def test_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper, where ptxas can be trusted, and Blackwell in data centers; the others have the kernels of "triton"."""
    monkeypatch.setattr(assembler, "_tool", lambda: "a ptxas")
    for capability, taken in (((8, 9), 0), ((9, 0), 1), ((10, 0), 1), ((10, 3), 1), ((11, 0), 0), ((12, 0), 0)):
        call = dataclasses.replace(CALL, capability=capability)
        choice = kernels.resolve(call)
        assert ("plane" if taken else "triton") == choice.backend.NAME
        assert taken or choice.declined == {"plane": "it is for compute capability 9.0 and 10.x"}
        assert kernels.resolve(dataclasses.replace(call, mode="a8", codec="crumb")).backend.NAME == "triton"
    monkeypatch.setattr(assembler, "_tool", lambda: None)
    choice = kernels.resolve(CALL)
    assert choice.backend.NAME == "triton" and "TRITON_PTXAS_PATH" in choice.declined["plane"]
    assert kernels.resolve(dataclasses.replace(CALL, capability=(10, 0))).backend.NAME == "plane"
    for changes in ({"dtype": torch.float32}, {"scheme": "affine", "codec": "nibble"}, {"group_size": 64}):
        assert kernels.resolve(dataclasses.replace(CALL, **changes)).backend.NAME == "unpack"


@once
def test_which_ptxas(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Hopper if it is new enough, else that of Blackwell, and only with a Triton whose PTX is right."""
    import triton as library

    def versions(hopper: str, blackwell: str, version: str = "3.8.0") -> str | None:
        tools = {"ptxas": hopper, "ptxas_blackwell": blackwell}
        nvidia = SimpleNamespace(**{name: SimpleNamespace(path=name, version=found) for name, found in tools.items()})
        monkeypatch.setattr(library, "knobs", SimpleNamespace(nvidia=nvidia))
        monkeypatch.setattr(library, "__version__", version)
        tool = assembler._tool()
        return None if tool is None else tool.path

    assert versions("12.9", "13.3") == "ptxas_blackwell" and versions("13.4", "14.0") == "ptxas"
    assert versions("12.9", "13.2") is None and versions("13.3", "13.3", "3.7.1") is None
    assert assembler.unavailable() is not None
    assert assembler.maker(b"..Cuda compilation tools, release 12.9, V12.9.86..") == (12, 9)
    assert assembler.maker(b"nothing") == (0, 0)


@dataclasses.dataclass(eq=False)
class Compiled:
    """As much of a kernel of Triton."""

    asm: dict[str, bytes]


@once
def test_machine_code_of_an_old_ptxas_is_refused() -> None:
    """Also where it comes from Triton's cache; on Blackwell products read tensor memory, and any will do."""
    releases = (b"13.2, V13.2.51", b"13.3, V13.3.33")
    old, new = (Compiled({"cubin": b"\x7fELF Cuda compilation tools, release " + found}) for found in releases)
    hopper, blackwell = configs.PLANE_TILES["sm_90"][0], configs.PLANE_TILES["sm_100"][0]
    for _ in range(2):
        with pytest.raises(BackendError, match=r"old ptxas.*ptxas of CUDA 13\.3"):
            assembler.check(old, hopper)
        assembler.check(new, hopper)
        assembler.check(old, blackwell)


def raising(error: Exception) -> Callable:
    def launch(*_arguments: object) -> None:
        raise error

    return launch


def wrong(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, *_: object) -> None:
    out.copy_(eager.multiply(x, weight, bias)).mul_(1.1)


@once
@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (wrong, "computed wrong values"),
        (raising(RuntimeError("out of resource: shared memory")), "could not compile or start"),
        (raising(BackendError("Triton's cache holds a kernel that an old ptxas made", "empty it")), "old ptxas"),
    ],
    ids=["values", "launch", "assembler"],
)
def test_where_it_fails_the_others_go_on(launch: Callable, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dispatch: the kernels of "triton" multiply in its place, and stay verified and in use."""
    launched = []

    def faulty(x: torch.Tensor, weight: PackedWeight, bias: None, out: torch.Tensor, chosen: configs.Config, mode: str):
        launched.append(bool(chosen.plane))
        if chosen.plane:
            launch(x, weight, bias, out, chosen, mode)
        else:
            out.copy_(eager.multiply(x, weight, bias))

    monkeypatch.setattr(backend, "launch", faulty)
    monkeypatch.setattr(assembler, "of", lambda chosen: contextlib.nullcontext())
    taking = [
        SimpleNamespace(NAME=b.NAME, MODES=b.MODES, declines=eager.declines, multiply=b.multiply)
        for b in (by_plane, triton)
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", (*taking, eager))
    weight, x = random_weight("ternary", "trit5", 41, 128), torch.randn(3, 128, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(kernels.linear(x, weight), eager.multiply(x, weight))
    choice = kernels.resolve(kernels.call_of(x.device, x.dtype, weight))
    assert choice.backend.NAME == "triton" and reason in choice.declined["plane"]
    assert launched == [True, False, False, False]  # two of them probes


@once
def test_memory_that_runs_out_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(backend, "launch", raising(failure))
    monkeypatch.setattr(assembler, "of", lambda chosen: contextlib.nullcontext())
    with pytest.raises(torch.OutOfMemoryError) as found:
        by_plane.multiply(torch.randn(3, 128, dtype=torch.bfloat16), random_weight("binary", "bit", 41, 128))
    assert found.value is failure
