"""One change of a folder that a reader takes: of bytes, of structure, of what lies under a name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from . import torch_files
from .values import RAW, TEXTS, changed, hostile, number, spelled

GB, LARGE = 1 << 30, 64 << 20
Mutation = Callable[[Path, Random], str | None]
"""Changes a file; returns the name of the one tensor or entry that it made another, None where there is no one."""


def mutate(folder: Path, rng: Random) -> tuple[str, tuple[str, str] | None]:
    """Changes one of a folder's files. Returns which and how, and (file, key) where one thing in it has a name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    if not files:
        return "nothing left", None
    path = rng.choice(files)
    kinds = [*OF_SUFFIX.get(path.suffix, []) * 3, *OF_BYTES * 2, *OF_PLACE]
    if path.stat().st_size > LARGE:  # made so by the change before
        kinds = [gone, pipe, folder, link]
    kind = rng.choice(kinds)
    key = kind(path, rng)
    return f"{kind.__name__} {path.relative_to(folder)}", (str(path), key) if key else None


# Bytes.


def flip(path: Path, rng: Random) -> None:
    raw = bytearray(path.read_bytes())
    ahead = min(len(raw), rng.choice((16, 256, 4096, len(raw))))
    for _ in range(rng.choice((1, 2, 8, 64)) if raw else 0):
        raw[rng.randrange(ahead)] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, rng: Random) -> None:
    size = path.stat().st_size
    os.truncate(path, rng.choice((0, 1, 7, 8, 9, 24, size // 2, max(0, size - 1), rng.randrange(size + 1))))


def lengthen(path: Path, rng: Random) -> None:
    os.truncate(path, path.stat().st_size + rng.choice((1, 8, 64, 4096, GB)))


def overwrite(path: Path, rng: Random) -> None:
    raw = bytearray(path.read_bytes())
    if raw:
        at, size = rng.randrange(len(raw)), rng.choice((1, 2, 4, 8, 64, 4096))
        raw[at : at + size] = rng.choice((bytes(size), b"\xff" * size, b"\x7f" * size, rng.randbytes(size)))[
            : len(raw) - at
        ]
    path.write_bytes(raw)


# Safetensors.


def header(path: Path, rng: Random) -> None:
    """Something in the header."""
    described, data = _header(path)
    for _ in range(rng.choice((1, 1, 2, 4))):
        described = changed(described, rng)
    _write(path, spelled(described, rng), data)


def tensor(path: Path, rng: Random) -> str | None:
    """Dtype, shape or place of one tensor, so that the sizes still fit or not."""
    described, data = _header(path)
    names = [name for name in described if name != "__metadata__"] if isinstance(described, dict) else []
    if not names:
        return None
    name = rng.choice(names)
    entry = described[name]
    kind = rng.randrange(6)
    shape = entry["shape"]
    if kind == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U32", "U64")
        )
    elif kind == 1:
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [_product(shape)], [0, *shape]))
    elif kind == 2 and shape:
        entry["shape"] = [size * 2 for size in shape[:1]] + shape[1:]
    elif kind == 3:
        entry["data_offsets"] = described[rng.choice(names)]["data_offsets"]
    elif kind == 4:
        other = rng.choice(names)
        described[name], described[other] = described[other], described[name]
    else:
        size = number(rng) % (1 << 40)
        entry |= {"dtype": "U8", "shape": [size], "data_offsets": [entry["data_offsets"][0]] * 2}
        entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][0] + size]
    _write(path, json.dumps(described).encode(), data)
    return name if kind < 3 else None


def rename(path: Path, rng: Random) -> None:
    """A tensor that is called otherwise, is there no more or is new."""
    described, data = _header(path)
    if not isinstance(described, dict) or not described:
        return
    name = rng.choice(list(described))
    ends = ("weight", "weight_scale", "weight_zero", "weight_up", "scales", "biases", "zeros", "signs", "W_q", "bias")
    ends += ("metadata", "orig_shape", "token_ids", "comfy_quant", "bonsai.record", "lora_A.weight", "meta_scale")
    other = rng.choice((f"{name.rpartition('.')[0]}.{rng.choice(ends)}", f"model.diffusion_model.{name}", f"{name}.1"))
    other = rng.choice((other, rng.choice(TEXTS), name.replace("0", str(abs(number(rng)) % 10**9))))
    if rng.random() < 0.3:
        described[other] = described[name]
    else:
        described[other] = described.pop(name)
    _write(path, json.dumps(described).encode("utf-8", "surrogatepass"), data)


def many(path: Path, rng: Random) -> None:
    """Thousands of tensors of no bytes."""
    described, data = _header(path)
    if isinstance(described, dict):
        form = rng.choice(("double_blocks.{}.a", "a{}.weight", "model.layers.{}.a.weight", "{}", "a.{}.weight_scale"))
        count = rng.choice((600, 5000, 30_000))
        end = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        described |= {form.format(i): end for i in range(count)}
        _write(path, json.dumps(described).encode(), data)


def metadata(path: Path, rng: Random) -> None:
    """What a file says of itself: our record's JSON is changed inside."""
    described, data = _header(path)
    if not isinstance(described, dict):
        return
    said = described.get("__metadata__")
    said = dict(said) if isinstance(said, dict) else {}
    for key, text in list(said.items()):
        if isinstance(text, str) and text[:1] == "{":
            try:
                said[key] = spelled(changed(json.loads(text), rng), rng).decode("utf-8", "replace")
            except ValueError:
                said[key] = text[: len(text) // 2]
    kind = rng.randrange(4)
    if kind == 0:
        said[rng.choice(TEXTS)] = json.dumps(hostile(rng))
    elif kind == 1:
        said["bonsai"] = json.dumps({"version": 1, "layers": hostile(rng), "variant": "a", "architecture": "b"})
    _write(path, json.dumps(described | {"__metadata__": said}).encode("utf-8", "surrogatepass"), data)


def length(path: Path, rng: Random) -> None:
    """The length of the header, which the file may be long enough for."""
    raw = path.read_bytes()
    path.write_bytes((abs(number(rng)) % (1 << 64)).to_bytes(8, "little") + raw[8:])
    if rng.random() < 0.5:
        os.truncate(path, GB)


# JSON.


def value(path: Path, rng: Random) -> str | None:
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        tree = {}
    before = tree
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = changed(tree, rng) if isinstance(tree, (dict, list)) else hostile(rng)
    raw = spelled(tree, rng)
    path.write_bytes(raw)
    if not (
        isinstance(before, dict) and isinstance(tree, dict) and raw == json.dumps(tree).encode("utf-8", "surrogatepass")
    ):
        return None
    other = [key for key in {**before, **tree} if before.get(key, before) != tree.get(key, tree)]
    return other[0] if len(other) == 1 else None


def other_value(path: Path, rng: Random) -> None:
    path.write_bytes(rng.choice((spelled(hostile(rng), rng), rng.choice(RAW), rng.randbytes(64))))


# GGUF.


def field(path: Path, rng: Random) -> None:
    """A number of the header, wherever one may stand."""
    raw = bytearray(path.read_bytes())
    size = rng.choice((4, 8))
    at = rng.choice((4, 8, 16, rng.randrange(24, max(25, min(len(raw), 3000)))))
    raw[at : at + size] = (abs(number(rng)) % (1 << 8 * size)).to_bytes(size, "little")
    path.write_bytes(raw)


# What lies under the name.


def gone(path: Path, rng: Random) -> None:
    path.unlink()


def pipe(path: Path, rng: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: Random) -> None:
    """To a device without end, to itself, to nothing, to a folder above or to a file of the system."""
    path.unlink()
    path.symlink_to(
        rng.choice(("/dev/zero", "/dev/full", "/dev/stdin", path.name, "nothing", "..", "/etc/passwd", "/"))
    )


def sparse(path: Path, rng: Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.choice((0, 8, 64))])
    os.truncate(path, rng.choice((GB, 1 << 40)))


def suffix(path: Path, rng: Random) -> None:
    """The content of another kind of file."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    raw = rng.choice(others).read_bytes() if others and rng.random() < 0.5 else None
    path.write_bytes(raw or rng.choice((b"PK\3\4", b"GGUF", b"{}", b"\x80\x04.", b"\x93NUMPY", b"\0" * 64)))


def beside(path: Path, rng: Random) -> None:
    """A JSON that no release has there."""
    names = ("config.json", "quantization_config.json", "model_index.json", "x.index.json", f"{path.name}.json")
    new = path.parent / rng.choice((*names, "rotation.json", "manifest.json", f"{path.name}.index.json"))
    if new.is_symlink() or new.exists():
        return
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(new)
    elif kind == 1:
        new.symlink_to(rng.choice(("/dev/zero", new.name, "nothing", "..")))
    elif kind == 2:
        new.write_text("{")
        os.truncate(new, GB)
    else:
        new.write_bytes(spelled({"weight_map": hostile(rng), "bits": hostile(rng), "num_layers": hostile(rng)}, rng))


OF_BYTES: list[Mutation] = [flip, cut, lengthen, overwrite]
OF_PLACE: list[Mutation] = [gone, pipe, folder, link, sparse, suffix, beside]
OF_SUFFIX: dict[str, list[Mutation]] = {
    ".safetensors": [header, header, tensor, tensor, rename, many, metadata, metadata, length],
    ".json": [value, value, value, other_value],
    ".gguf": [field, field, field],
    ".pt": [*torch_files.MUTATIONS],
}


def _header(path: Path) -> tuple[object, bytes]:
    """(the JSON of a safetensors file, {} where there is none; its data)."""
    raw = path.read_bytes()
    size = min(int.from_bytes(raw[:8], "little"), len(raw))
    try:
        return json.loads(raw[8 : 8 + size]), raw[8 + size :]
    except (ValueError, RecursionError):
        return {}, raw[8 + size :]


def _write(path: Path, described: bytes, data: bytes) -> None:
    path.write_bytes(len(described).to_bytes(8, "little") + described + data)


def _product(shape: list) -> object:
    size = 1
    for length in shape:
        if not isinstance(length, int):
            return length
        size *= length
    return size
