"""A convolutional VAE on a CPU, its wide convolutions with a quarter of the products, beside ComfyUI's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from twins import load_device, relative

from bonsai_ops.tools import synthetic

pytestmark = pytest.mark.host

TOLERANCE = 1e-4
"""Of picture and latent, relative (L2), fp32. Found: 2e-6."""


@pytest.mark.parametrize("widths", [(128, 128, 128, 128), (32, 64, 64, 64)], ids=str)
def test_pictures_and_latents_stay(widths: tuple[int, ...], comfy: Any, tmp_path: Path) -> None:
    from bonsai_ops.host.vae import load_vae

    synthetic.write_vae(tmp_path / "vae", widths)
    vae = load_vae(tmp_path)
    ours = [m for m in vae.first_stage_model.modules() if "_conv_forward" in vars(m)]
    assert {m.kernel_size for m in ours} == ({(3, 3), (1, 1)} if min(widths) >= 128 else set())
    latent, picture = torch.randn(1, 128, 3, 5, generator=torch.Generator().manual_seed(0)), torch.rand(1, 32, 48, 3)
    with torch.inference_mode():
        found = vae.decode(latent), vae.encode(picture)
    for module in ours:
        del module._conv_forward
    with torch.inference_mode():
        truth = vae.decode(latent), vae.encode(picture)
    for one, other in zip(found, truth, strict=True):
        assert relative(one, other) < TOLERANCE
        changed = bool(ours) and load_device().type == "cpu" and vae.vae_dtype == torch.float32
        assert torch.equal(one, other) != changed


@pytest.mark.processor
def test_memory_is_used_again_while_a_picture_is_decoded(comfy: Any, tmp_path: Path) -> None:
    """And given back at the end, also when decoding fails."""
    from bonsai_ops import kernels
    from bonsai_ops.host.vae import load_vae

    synthetic.write_vae(tmp_path / "vae", (128, 128, 128, 128))
    vae = load_vae(tmp_path)
    kept: list[int] = []
    last = vae.first_stage_model.decoder.conv_out
    last.register_forward_pre_hook(lambda *_: kept.append(kernels.kept_bytes()))
    latent = torch.randn(1, 128, 4, 5)
    with torch.inference_mode():
        vae.decode(latent)
        assert len(kept) == 1 and kept[0] > 64 * 80 * 128 * 4 and kernels.kept_bytes() == 0
        last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vae.first_stage_model.decode(latent)
    assert len(kept) == 2 and kept[1] > 0 and kernels.kept_bytes() == 0
