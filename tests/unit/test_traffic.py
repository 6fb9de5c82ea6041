"""What unpacking by torch's operators moves: few bytes and operators, and values of the codes' formula to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_weights import bits, random_weight

from bonsai_ops.tools.bench import traffic
from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("case", traffic.CASES, ids="-".join)
def test_no_more_than_allowed(case: tuple[str, str]) -> None:
    assert traffic.measure(*case).failures() == []


def test_what_is_counted() -> None:
    """Reads and writes, what a view skips, what is repeated once; no views and no allocations."""
    x = torch.zeros(4, 6, dtype=torch.int16)
    for call, launches, nbytes in (
        (lambda: x + 1, 1, 96),
        (lambda: x.add_(1), 1, 96),
        (lambda: torch.add(x, 1, out=torch.empty_like(x)), 1, 96),
        (lambda: x.view(torch.int8)[:, ::2].mul(torch.ones(1, 1, dtype=torch.int8)), 2, 48 + 24 + 1 + 1),
        (lambda: x[:, :1].expand(4, 6) + x, 1, 4 * 12 + 48 + 48),
        (lambda: x.view(6, 4)[:2].t(), 0, 0),
    ):
        with traffic.Traffic() as found:
            call()
        assert (found.launches, found.nbytes) == (launches, nbytes)


def expected(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """By codes, plane after plane, and the formula of packed_weight.py, in float32 and rounded once."""
    codes = codecs.decode(weight.codec, weight.codes, weight.shape[0]).float().unflatten(1, (-1, weight.group_size))
    scale = weight.scale.float().unsqueeze(2)
    zero = None if weight.zero is None else weight.zero.float().unsqueeze(2)
    if weight.scheme in ("binary", "ternary"):
        step = 2 if weight.scheme == "binary" else 1
        return ((1 - step * codes).to(dtype) * scale.to(dtype)).flatten(1)
    values = codes * scale + zero if weight.scheme == "affine" else (codes - zero) * scale
    return values.to(dtype).flatten(1)


@pytest.mark.parametrize("scratch", [1, 40_000, 1 << 20], ids=["rows", "a plane", "planes"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_values_to_the_bit(pair: tuple[str, str], scratch: int) -> None:
    """Scales of both signs, zero, subnormal, huge and infinite; pieces of some planes and within one."""
    edges = torch.tensor([0.7, -1.3, 0.0, -0.0, 1e-40, -6e-8, 65504, -3e38, float("inf"), 1.0003])
    for number, (rows, columns, group) in enumerate(((83, 384, 128), (39, 192, 96), (200, 64, 32), (1, 128, 128))):
        for dtype in DTYPES:
            weight = random_weight(*pair, rows, columns, group, torch.float32)
            scale = edges[torch.arange(weight.scale.numel()) % len(edges)].view(weight.scale.shape)
            table = DTYPES[number % 3]
            zero = None if weight.zero is None else (weight.zero * 1.01).to(table)
            weight = dataclasses.replace(weight, scale=scale.to(table), zero=zero)
            pieces = list(weight.pieces(dtype, scratch))
            assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])]
            found, truth = torch.cat([values for _, _, values in pieces]), expected(weight, dtype)
            known = ~truth.isnan()
            assert torch.equal(found.isnan(), ~known) and torch.equal(bits(found)[known], bits(truth)[known])


def test_codes_that_no_file_should_have() -> None:
    """A fourth level of a crumb and bytes that trit5 makes of no codes: as the formula has them."""
    for codec in ("crumb", "trit5"):
        packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
        rows = 8 * codecs.get_codec(codec).fields
        weight = PackedWeight(packed, torch.full((rows, 1), 0.5), (rows, 32), "ternary", codec, 32)
        assert torch.equal(weight.dequantize(), expected(weight, torch.float32))
