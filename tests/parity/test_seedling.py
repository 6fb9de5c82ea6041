"""The shipped model, trained weights and all, goes through the packers of gemlite and mlx and comes back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peers.tiny_klein import is_quantized
from safetensors.torch import save_file

from bonsai_ops.tools.environment import PLUGIN
from training.unpack import read_values

pytestmark = pytest.mark.parity

PACK = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
FILES = {"ternary": PACK, "binary": PACK / "binary.safetensors"}


@pytest.mark.parametrize("scheme", FILES)
@pytest.mark.parametrize("packer", ["gemlite", "mlx", "unpacked"])
def test_other_formats_hold_the_same_model(packer: str, scheme: str, tmp_path: Path) -> None:
    truth = read_values(FILES[scheme])
    tensors: dict[str, torch.Tensor] = {}
    for name, values in truth.items():
        tensor = values.bfloat16()
        layer = name.removesuffix(".weight")
        if not is_quantized(name) or packer == "unpacked":
            tensors[name] = tensor
        elif packer == "gemlite":
            from peers import gemlite_pack

            tensors |= {f"{layer}.{leaf}": part for leaf, part in gemlite_pack.pack_linear(tensor, scheme).items()}
        else:
            from peers import mlx_pack

            parts = mlx_pack.pack_linear(tensor, scheme)
            tensors |= {f"{layer}.{leaf}": mlx_pack.to_torch(part) for leaf, part in parts.items()}
    if packer == "gemlite":
        path = tmp_path / "state_dict.pt"
        torch.save(tensors, path)
    else:
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file(tensors, path)
    found = read_values(path)
    assert found.keys() == truth.keys()
    assert [name for name in truth if not torch.equal(found[name], truth[name])] == []
