"""Changes of a torch file: of its values, of the steps of its pickle, of the archive around it."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats.torch_file import TorchFile

from .values import TEXTS, hostile, number

SNIPPETS = (
    b"cos\nsystem\nX\x04\0\0\0true\x85R",
    b"cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R",
    b"c_codecs\nencode\nX\x01\0\0\0bX\x04\0\0\0punyc\x86R",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
    b"ctorch.storage\n_load_from_bytes\nC\x00\x85R",
    b"ccollections\nOrderedDict\n]]N\x86a\x85R",
    b"(" * 5000,
    b")" + b"q\0h\0\x86" * 40,
    b"}X\x01\0\0\0a" * 60 + b"N" + b"s" * 60,
    b"\x8a\xff" + b"\x7f" * 255,
    b"X\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"N" * 5000 + b"0" * 5000,
    b"}(K\x01K\x02u",
    b"}(()N(NN)Nu",
    b"]h\0a",
    b"]q\1h\1a",
    b"\x95" + b"\xff" * 8,
    b"Fnan\n",
    b"I" + b"9" * 5000 + b"\n",
    b"P0\n",
    b"Q",
    b"0",
    b".",
    b"\x85" * 900,
)
"""What a pickle may have in it: what runs, what grows, what never ends, what is damaged."""


def values(path: Path, rng: Random) -> None:
    """Other values in the tables that it holds."""
    try:
        content = TorchFile(path, mapped=False).content  # torch alone may never end with what was changed already
    except PackError:
        return
    for _ in range(rng.choice((1, 1, 3))):
        table = content
        if not isinstance(table, dict) or not table:
            return
        key = rng.choice(list(table))
        while isinstance(table[key], dict) and table[key] and rng.random() < 0.8:
            table = table[key]
            key = rng.choice(list(table))
        if rng.random() < 0.15:
            table[rng.choice((*TEXTS[:8], 3, (1, 2), key, f"{key}.weight"))] = table.pop(key)
        else:
            table[key] = _other(table[key], rng)
    torch.save(content, path)


def _other(value: object, rng: Random) -> object:
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        kinds: list[Callable[[], object]] = [
            lambda: value.flatten(),
            lambda: value.unsqueeze(0),
            lambda: value.t() if value.ndim == 2 else value,
            lambda: value[:1].expand(1 << 20, *value.shape[1:]) if value.ndim else value.expand(1 << 28),
            lambda: value.to(rng.choice((torch.float64, torch.int8, torch.bool, torch.complex64, torch.float16))),
            lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else torch.full_like(value, 99),
            lambda: value[..., ::2] if value.ndim else value,
            lambda: torch.zeros(0, dtype=value.dtype),
            lambda: value.to_sparse() if value.ndim else value,
            lambda: value.to("meta"),
            lambda: torch.nn.Parameter(value.float()),
            lambda: torch.empty(value.shape, dtype=value.dtype).set_(value.untyped_storage(), 0, (1,), (1,)),
        ]
        return rng.choice(kinds)()
    return rng.choice((hostile(rng), torch.zeros(1 << 12), {"a": hostile(rng)}, torch.Size((3, 4)), torch.float16, 7))


def steps(path: Path, rng: Random) -> None:
    """A step of the pickle left out, doubled or put in."""
    members = _members(path)
    name = next((name for name in members if name.endswith("data.pkl")), None)
    if name is None:
        return
    raw = members[name]
    try:
        places = [at for _, _, at in pickletools.genops(raw)]
    except ValueError:
        return
    at = rng.choice(places)
    after = next((place for place in places if place > at), len(raw))
    kind = rng.randrange(5)
    if kind == 0:
        raw = raw[:at] + raw[after:]
    elif kind == 1:
        raw = raw[:after] + raw[at:after] * rng.choice((1, 2, 50)) + raw[after:]
    elif kind == 2:
        other = rng.choice(places)
        raw = raw[:at] + raw[other : other + (after - at)] + raw[after:]
    else:
        raw = raw[:at] + rng.choice(SNIPPETS) + raw[at:]
    _write(path, members | {name: raw})


def arguments(path: Path, rng: Random) -> None:
    """A number that the pickle holds: sizes, strides, places, how many elements."""
    members = _members(path)
    name = next((name for name in members if name.endswith("data.pkl")), None)
    if name is None:
        return
    raw = bytearray(members[name])
    try:
        found = [(op.name, at) for op, _, at in pickletools.genops(bytes(raw)) if op.name.startswith("BININT")]
    except ValueError:
        return
    for op, at in rng.sample(found, min(len(found), rng.choice((1, 1, 2, 5)))):
        size = {"BININT": 4, "BININT1": 1, "BININT2": 2}[op]
        raw[at + 1 : at + 1 + size] = (abs(number(rng)) % (1 << 8 * size)).to_bytes(size, "little")
    _write(path, members | {name: bytes(raw)})


def pickled_anew(path: Path, rng: Random) -> None:
    """Plain values in another protocol."""
    members = _members(path)
    name = next((name for name in members if name.endswith("data.pkl")), "a/data.pkl")
    content = {rng.choice(TEXTS[:8]): hostile(rng) for _ in range(3)}
    _write(path, members | {name: pickle.dumps(content, rng.randrange(6))})


def archive(path: Path, rng: Random) -> None:
    """Members compressed, twice, called otherwise, left out, or with something before and behind them."""
    members = _members(path)
    if not members:
        return
    name = rng.choice(list(members))
    kind = rng.randrange(7)
    if kind == 0:
        _write(path, members, zipfile.ZIP_DEFLATED)
    elif kind == 1:
        _write(path, members, again=name)
    elif kind == 2:
        members[rng.choice((*TEXTS[:6], name.upper(), f"b/{name}", name + "/"))] = members.pop(name)
        _write(path, members)
    elif kind == 3:
        del members[name]
        _write(path, members)
    elif kind == 4:
        path.write_bytes(rng.choice((b"#!/bin/sh\n", b"PK\3\4", bytes(64))) + path.read_bytes())
    elif kind == 5:
        path.write_bytes(path.read_bytes() + rng.choice((b"a", bytes(22), path.read_bytes()[-22:])))
    else:
        members[name] = rng.choice((b"", members[name][:-1], members[name] * 2, bytes(1 << 20)))
        _write(path, members)


def index(path: Path, rng: Random) -> None:
    """A number of the archive's index or of its end."""
    raw = bytearray(path.read_bytes())
    end, first = raw.rfind(b"PK\5\6"), raw.find(b"PK\1\2")
    if min(end, first) < 0:
        return
    at, size = rng.choice(((end + rng.choice((8, 10, 12, 16)), 4), (first + rng.choice((8, 10, 20, 24, 28, 42)), 4)))
    entries = [i for i in range(first, end) if raw[i : i + 4] == b"PK\1\2"]
    at += rng.choice(entries) - first if at < end else 0
    raw[at : at + size] = struct.pack("<I", abs(number(rng)) % (1 << 32))
    path.write_bytes(raw)


MUTATIONS = (values, values, steps, steps, arguments, arguments, pickled_anew, archive, index)


def _members(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as opened:
            return {member.filename: opened.read(member) for member in opened.infolist()}
    except Exception:  # changed already
        return {}


def _write(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED, again: str = "") -> None:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as opened:
        warnings.simplefilter("ignore")
        for name, raw in members.items():
            opened.writestr(name.encode("utf-8", "replace").decode() or "a", raw)
        if again:
            opened.writestr(again, members[again][:-1])
    path.write_bytes(out.getvalue())
