"""Files that everybody has, each alone in its folder of ComfyUI's, and what the log and Bonsai Model Info call them.

The text encoder is the seedling's, which has the form of the published one and ships.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from twins import run_node

from bonsai_ops.tools import synthetic

pytestmark = pytest.mark.host

SEEDLING = Path(synthetic.__file__).resolve().parents[1] / "models" / "bonsai" / "seedling"
HELP = Path(__file__).resolve().parents[3] / "web" / "docs" / "LoadBonsaiTextEncoder.md"
NAME = "Qwen3-4B-4bit.safetensors"


@pytest.fixture
def models(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ComfyUI's for text encoders and VAEs and ours in it, all empty."""
    import folder_paths

    known = folder_paths.folder_names_and_paths
    for kind in ("text_encoders", "vae", "bonsai"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(known, kind, ([str(tmp_path / kind)], known["vae"][1]))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def encoded(clip: Any) -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize("a bonsai"))[0][0]


def test_the_text_encoder_alone(models: Path) -> None:
    """No folder around it, beside the config.json of another model: the same CLIP as of the pack."""
    from bonsai_ops.host import folders
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    shutil.copyfile(SEEDLING / "text_encoder-mlx-4bit" / "model.safetensors", models / "text_encoders" / NAME)
    config = {"hidden_size": 1024, "num_hidden_layers": 24, "group_size": 128}
    (models / "text_encoders" / "config.json").write_text(json.dumps(config))
    assert NAME in folders.text_encoder_names()
    alone = encoded(load_bonsai_text_encoder(folders.text_encoder_path(NAME)))
    assert torch.equal(alone, encoded(load_bonsai_text_encoder(SEEDLING)))


def test_the_stock_loader_refuses_it(models: Path) -> None:
    """As the help says, with torch's words; the width is the published one's, for ComfyUI knows the model by that."""
    import comfy.sd

    assert "size mismatch for model.embed_tokens.weight" in HELP.read_text(encoding="utf-8")
    sizes = {"vocab_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    geometry = synthetic.TextGeometry(hidden=2560, mlp=128, heads=1, key_heads=1, layers=1, vocabulary=64)
    synthetic.write_text_encoder(models / "text_encoders", geometry)
    options = {"qwen3_4b_model_config": sizes | {"hidden_size": 2560, "num_hidden_layers": 1}}
    path = models / "text_encoders" / "model.safetensors"
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.embed_tokens\.weight"):
        comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.FLUX2, model_options=options)


def test_the_full_vae_alone(models: Path) -> None:
    """diffusers' names and the published sizes, in models/vae under any name: what Load VAE decodes and encodes."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        truth = diffusers.AutoencoderKLFlux2()
    noise = torch.randn(512 * 512 * 9, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, tensor in truth.state_dict().items():
        values = noise[: tensor.numel()].view(tensor.shape)
        state[name] = values / values[0].numel() ** 0.5 if tensor.ndim > 1 else torch.ones_like(values)
        state[name] = state[name].to(torch.int64 if "num_batches" in name else torch.bfloat16)
    save_file(state, models / "vae" / "any name.safetensors")
    assert sum(t.numel() for t in state.values()) == 84_046_372 and len(state) == 251
    truth.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()}, assign=True)
    latent = torch.randn(1, 128, 1, 1, generator=torch.Generator().manual_seed(0))
    vae = run_node("nodes.VAELoader", vae_name="any name.safetensors")
    with torch.no_grad():
        expected = truth.eval().decode(torch.nn.functional.pixel_shuffle(latent * (1 + 1e-4) ** 0.5 + 1, 2)).sample
    found = vae.decode(latent).movedim(-1, 1)
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def lines_of(model: Any) -> Mapping[str, str]:
    from bonsai_ops.host.info import describe

    return dict(describe(model))


def test_the_log_and_the_info_name_a_release(
    comfy: Any, packs: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The shipped pack by its hash, a changed copy of it and any other file as unknown."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
    from bonsai_ops.host.vae import load_vae

    with caplog.at_level(logging.INFO):
        model = load_bonsai_model(SEEDLING / "binary.safetensors")
        load_bonsai_text_encoder(SEEDLING)
        load_vae(SEEDLING)
        other = load_bonsai_model(packs["ternary"])
    assert lines_of(model)["release"] == "binary seedling, shipped with this plugin (by sha256)"
    assert lines_of(model.clone())["release"] == lines_of(model)["release"]
    assert lines_of(other)["release"] == "unknown file"
    told = "\n".join(r.getMessage() for r in caplog.records)
    for name in ("binary seedling", "text encoder of the seedling", "VAE of the seedling"):
        assert f", {name}, shipped with this plugin (by sha256)" in told
    assert f"{packs['ternary']}, unknown file" in told
