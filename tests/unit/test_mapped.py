"""Weights that are copied out of their file: nothing that happens to it afterwards changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bonsai_ops.tools import synthetic
from bonsai_ops.weights import flux2
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

SMALL = flux2.Geometry(hidden=128, context=128, in_channels=128, double_blocks=1, single_blocks=1)
FILES = {"model.safetensors": synthetic.write_mlx, "state_dict.pt": synthetic.write_gemlite}


@pytest.mark.parametrize("name", FILES)
def test_an_overwritten_file_changes_no_copy(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path, "ternary", SMALL)
    weights = read_weights(open_transformer(path, mapped=False))
    values = {n: w.scale if isinstance(w, PackedWeight) else w for n, w in weights.items()}
    before = {n: value.clone() for n, value in values.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(values[n], before[n]) for n in values)
