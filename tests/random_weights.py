"""Packed weights of random codes, for the tests of what multiplies them."""

from __future__ import annotations

import functools

import torch

from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight


@functools.cache
def random_weight(
    scheme: str, codec: str, rows: int, columns: int, group_size: int = 128, table: torch.dtype = torch.bfloat16
) -> PackedWeight:
    """A weight [rows, columns] whose scales are 0.5 .. 1.5 in the dtype `table`; a zero table centres the codes.

    The same one at each call: not to be written to.
    """
    generator = torch.Generator().manual_seed(rows + columns)
    levels = SCHEMES[scheme].levels or codecs.get_codec(codec).radix
    codes = torch.randint(0, levels, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, columns // group_size, generator=generator) + 0.5).to(table)
    zero = {"affine": -scale * (levels // 2), "zero_point": scale * 8}.get(scheme)
    return PackedWeight(codecs.encode(codec, codes), scale, (rows, columns), scheme, codec, group_size, zero)


def truth(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The values as codec.py and packed_weight.py describe them, in float64; those of signs with rounded scales."""
    coder = codecs.get_codec(weight.codec)
    rest, planes = weight.codes.to(torch.int64), []
    for _ in range(coder.fields):
        rest = rest * coder.radix
        planes.append(rest // 256)
        rest = rest % 256
    codes = torch.cat(planes)[: weight.shape[0]].double().unflatten(1, (-1, weight.group_size))
    scale = weight.scale.unsqueeze(2)
    values = {
        "binary": lambda: (1 - 2 * codes) * scale.to(dtype).double(),
        "ternary": lambda: (1 - codes) * scale.to(dtype).double(),
        "affine": lambda: codes * scale.double() + weight.zero.unsqueeze(2).double(),
        "zero_point": lambda: (codes - weight.zero.unsqueeze(2).double()) * scale.double(),
    }[weight.scheme]()
    return values.flatten(1)


def bits(values: torch.Tensor) -> torch.Tensor:
    """Floats as integers, for comparisons that tell -0 from 0."""
    return values.view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize])
