"""Native files that earlier versions of the plugin wrote. tests/data holds one of each format version; they stay."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.packed_weight import PackedWeight

DATA = Path(__file__).parents[1] / "data"
FILES = {
    "native_v1": {
        "img_in.weight": ("bf16", "4189267a298182b7"),
        "double_blocks.0.img_mlp.0.weight": ("ternary trit5 32", "b43cdde8198172f0"),
        "double_blocks.0.img_mlp.2.weight": ("binary bit 64", "83afad0257a13165"),
        "single_blocks.0.linear1.weight": ("affine crumb 32", "29beef1b4df45665"),
        "single_blocks.0.linear2.weight": ("zero_point nibble 32", "93ed8fee3c235b5a"),
    },
    "native_v2": {
        "out.weight": ("fp32", "b4cdab1cf638d200"),
        "input_blocks.1.weight": ("ternary crumb 32", "b18558ab785dc2b2"),
        "input_blocks.1.weight up": ("bf16", "4b15661919dbf679"),
        "input_blocks.1.weight down": ("bf16", "fe4d755949761a55"),
        "input_blocks.2.weight": ("affine byte 32", "8876dc0c14757abc"),
    },
}
"""{file: {tensor: (what it is, beginning of the sha256 of its values as float32)}}, as the writer's own reader had
them; the values of a packed weight without those of its residual, whose product depends on the processor."""
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", FILES)
def test_values_of_an_old_file(name: str) -> None:
    found = {}
    for key, entry in open_pack(DATA / f"{name}.safetensors").entries.items():
        weight = entry.weight()
        if isinstance(weight, PackedWeight):
            form = f"{weight.scheme} {weight.codec} {weight.group_size}"
            found[key] = (form, digest(weight.without_residual().dequantize()))
            for matrix in ("up", "down"):
                if (tensor := getattr(weight, matrix)) is not None:
                    found[f"{key} {matrix}"] = (NAMES[tensor.dtype], digest(tensor))
        else:
            found[key] = (NAMES[weight.dtype], digest(weight))
    assert found == FILES[name]


def test_records_of_old_files() -> None:
    first, second = (open_pack(DATA / f"{name}.safetensors") for name in FILES)
    assert (first.format, first.architecture, first.configuration) == ("native", "flux2", {})
    assert first.source == {"file": "pack.safetensors", "sha256": "00"}
    assert (second.format, second.architecture) == ("native", "SDXL")
    assert second.configuration == {"class": "SDXL", "model_type": "EPS"} and second.source == {
        "file": "pack.safetensors"
    }
