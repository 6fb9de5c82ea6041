"""Weights that are copied out of their file: nothing that happens to it changes them or ends the process."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import reason

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import PLUGIN as REPOSITORY
from bonsai_ops.weights import flux2
from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

SMALL = flux2.Geometry(hidden=128, context=128, in_channels=128, double_blocks=1, single_blocks=1)


def write_gguf(path: Path) -> None:
    """One tensor of fp16 and one of TQ2_0."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    for name, kind, at in (("a.weight", 1, 0), ("b.weight", 35, 128 * 256 * 2)):
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I2QIQ", 2, 256, 128, kind, at)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(128 * 256 * 2 + 128 * 66))


FILES: dict[str, Callable[[Path], None]] = {
    "model.safetensors": lambda path: synthetic.write_mlx(path, "ternary", SMALL),
    "state_dict.pt": lambda path: synthetic.write_gemlite(path, "ternary", SMALL),
    "w.gguf": write_gguf,
}


@pytest.mark.parametrize("name", ["model.safetensors", "state_dict.pt"])
def test_an_overwritten_file_changes_no_copy(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    weights = read_weights(open_transformer(path, mapped=False))
    values = {n: w.scale if isinstance(w, PackedWeight) else w for n, w in weights.items()}
    before = {n: value.clone() for n, value in values.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(values[n], before[n]) for n in values)


SHORTENED = """
import os, sys
from pathlib import Path
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.packed_weight import PackedWeight
for path in map(Path, sys.argv[2:]):
    pack = open_pack(path, mapped=False)
    if sys.argv[1] == "opened":
        os.truncate(path, 64)
    try:
        weights = [entry.weight() for entry in pack.entries.values()]
    except PackError as error:
        print(error)
        continue
    os.truncate(path, 64)
    values = [w.codes if isinstance(w, PackedWeight) else w for w in weights]
    print(len(values), sum(float(v.double().sum()) for v in values))
"""


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_file_that_is_cut_off_ends_no_process(when: str, tmp_path: Path) -> None:
    """As cp and wget do that write onto it: of mapped pages that are gone a process dies by a bus error."""
    paths = [tmp_path / name for name in FILES]
    for path in paths:
        FILES[path.name](path)
    line = [sys.executable, "-c", SHORTENED, when, *map(str, paths)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for path, text in zip(paths, said, strict=True):
        if when == "read" or path.suffix == ".pt":  # which is read whole when it is opened
            assert text[0].isdigit(), text
        else:
            assert "ends here, and did not when it was opened. Wait until" in reason(text, path)


@pytest.mark.parametrize("name", FILES)
def test_copies_have_the_same_values(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    mapped, copied = (open_pack(path, mapped=m).entries for m in (True, False))
    for key, entry in mapped.items():
        found, expected = copied[key].weight(), entry.weight()
        if isinstance(expected, PackedWeight):
            found, expected = (w.dequantize(torch.float32) for w in (found, expected))
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_file_that_is_replaced_is_read_as_it_was_opened(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "x" / "model.safetensors"
    synthetic.write_mlx(path, "ternary", SMALL, 0)
    synthetic.write_mlx(other, "ternary", SMALL, 1)
    expected = read_weights(open_transformer(path))
    pack = open_transformer(path, mapped=False)
    try:
        other.replace(path)
    except PermissionError:
        pytest.skip("this system replaces no open file")
    found = read_weights(pack)
    for name, weight in expected.items():
        if isinstance(weight, PackedWeight):
            assert torch.equal(found[name].codes, weight.codes)
