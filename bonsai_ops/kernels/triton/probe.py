"""The product with which a kernel is compared before it is used, and what Triton compiles a kernel of its own for.

A compiler or GPU nobody has tried must not change pictures silently. A kernel may be right in its first tile and wrong
in the next one, in the last columns or in the rows that stand over: the probe has several of all of them, and each of
its values counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...weights.codec import encode, get_codec
from ...weights.packed_weight import SCHEMES, PackedWeight
from .. import eager
from ..call import EXACT
from ..failure import BackendError
from .configs import GROUP, Config

ALIGNED = 16
"""What Triton asks of numbers and addresses: it compiles a kernel of its own for those that this divides, and for 1."""
TOLERANCE = 0.02
"""Of a value, and of the root of the mean square of all; two roundings to bf16 are 0.4 % each."""

Launch = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, torch.Tensor, Config, str], None]


@dataclass(frozen=True)
class Size:
    """Of a probe: at least so many tokens, rows and columns, and so many tiles of tokens and of byte rows."""

    tokens: int
    rows: int
    columns: int
    tiles: int


SIZE = Size(384, 640, 1024, tiles=2)
SMALL = Size(17, 160, 2 * GROUP, tiles=0)
"""For Triton's interpreter, which takes minutes for what a GPU does in no time."""


def kind_of(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> tuple:
    """All calls of one kind run the same compiled kernel. x: [M, K]."""
    rows, n = weight.shape[0], get_codec(weight.codec).byte_rows(weight.shape[0]) // 8
    numbers = tuple(map(_alignment, (x.shape[0], rows, n)))
    tables = tuple(None if t is None else (t.dtype, t.data_ptr() % ALIGNED == 0) for t in (weight.scale, bias))
    return (x.device, x.dtype, weight.scheme, weight.codec, mode, numbers, tables)


def _alignment(number: int) -> int:
    return 1 if number == 1 else ALIGNED if number % ALIGNED == 0 else 0


def verify(
    launch: Launch,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    chosen: Config,
    mode: str,
    size: Size = SIZE,
) -> None:
    """Has `launch` multiply a probe of the kind of x [M, K], weight and bias, and compares each value with eager's.

    The probe has numbers that the mode represents exactly. Raises BackendError if a value is another one.
    """
    inputs, probe, shift = make(x, weight, bias, chosen, size, mode)
    out = torch.full((len(inputs), probe.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    launch(inputs, probe, shift, out, chosen, mode)
    expected = eager.multiply(inputs, probe, shift).float()
    bound = TOLERANCE * (expected.abs() + expected.square().mean().sqrt())
    if not bool(((out.float() - expected).abs() <= bound).all()):
        name = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type
        raise BackendError(
            f"Triton's {weight.scheme} kernel of mode {mode} computed wrong values on {x.device}",
            f"update this plugin and report mode {mode} on {name}",
        )


def make(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    chosen: Config,
    size: Size = SIZE,
    mode: str = EXACT,
) -> tuple[torch.Tensor, PackedWeight, torch.Tensor | None]:
    """(x, weight, bias) of a probe: of their kind, with edges that no tile fills."""
    device, columns = x.device, size.columns
    tokens = _tokens(x.shape[0], max(size.tokens, size.tiles * chosen.block_m))
    rows = _rows(weight, size, chosen.block_n)
    values = torch.arange(rows * columns, device=device).view(rows, columns) * 37 % 101
    codes = encode(weight.codec, (values % SCHEMES[weight.scheme].levels).to(torch.uint8))
    table = torch.arange(rows * (columns // GROUP), device=device).view(rows, -1)
    scale = _placed((0.5 + table % 7 / 8).to(weight.scale.dtype), weight.scale)
    probe = PackedWeight(codes, scale, (rows, columns), weight.scheme, weight.codec, GROUP)
    # the largest of each group is what x is divided by; e4m3 has four bits of a number, and 448 is 14 times 32
    step, span, largest, unit = (31, 29, 14, 4) if mode == "a8_fp8" else (29, 61, 127, 16)
    inputs = torch.arange(tokens * columns, device=device).view(tokens, columns) * step % span - span // 2
    inputs[:, ::GROUP] = largest
    shift = None if bias is None else _placed((torch.arange(rows, device=device) % 17 - 8).to(bias.dtype), bias)
    return inputs.to(x.dtype) / unit, probe, shift


def _tokens(like: int, least: int) -> int:
    """A number of tokens that is aligned as `like` is."""
    if like == 1:
        return 1
    tokens = least + (3 * ALIGNED - least) % (4 * ALIGNED)  # 48 more than a multiple of 64
    return tokens if _alignment(like) else tokens + 1


def _rows(weight: PackedWeight, size: Size, block: int) -> int:
    """A number of rows that is aligned as the weight's, and whose byte rows are. block: byte rows of a tile."""
    coder = get_codec(weight.codec)
    least = max(size.rows, (size.tiles * block + 8) * coder.fields)

    def numbers(rows: int) -> tuple[int, int]:
        return _alignment(rows), _alignment(coder.byte_rows(rows) // 8)

    # the pattern repeats; fewer rows only where a byte row is all that there is
    nearest = (*range(least, least + 16 * ALIGNED * coder.fields), *range(least - 1, 0, -1))
    wanted = numbers(weight.shape[0])
    fitting = [rows for rows in nearest if numbers(rows) == wanted]
    # where it can be, the last plane is not full, nor the last tile
    edges = [rows for rows in fitting if rows % (8 * coder.fields)] or fitting
    return next((rows for rows in edges if coder.byte_rows(rows) % block), edges[0])


def _placed(table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The table at an address that is aligned as that of `like`."""
    if like.data_ptr() % ALIGNED == 0:
        return table
    room = torch.empty(table.numel() + 1, dtype=table.dtype, device=table.device)
    return room[1:].view(table.shape).copy_(table)
