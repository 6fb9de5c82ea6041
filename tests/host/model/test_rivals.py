"""What a benchmark calls stock ComfyUI is ComfyUI's own in all its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.bench import picture

pytestmark = pytest.mark.host


def test_stock_has_nothing_of_ours(comfy: Any, tmp_path: Path) -> None:
    """Ours replaces methods of ComfyUI's layers, on the objects themselves or by classes of its own."""
    from bonsai_ops.tools.bench.inside.picture import loaders

    synthetic.write_vae(tmp_path / "vae")
    synthetic.write_dense(tmp_path / "dense.safetensors", synthetic.TINY)
    files = {"file": str(tmp_path / "dense.safetensors"), "vae": str(tmp_path / picture.VAE)}
    _, load_rest = loaders({"kind": "stock", **files})
    model, vae = load_rest()
    modules = [*vae.first_stage_model.modules(), *model.model.modules()]
    assert type(vae) is comfy.sd.VAE and any(isinstance(one, torch.nn.Conv2d) for one in modules)
    for module in modules:
        own = [type(module), *vars(module).values(), *module._forward_pre_hooks.values()]
        whose = {getattr(value, "__module__", None) or "" for value in own}
        assert not any(name.startswith(("bonsai", "host")) for name in whose), module
    assert model.get_attachment("bonsai") is None and not model.model_options["transformer_options"]
