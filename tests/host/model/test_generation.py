"""ComfyUI's node that generates text, and all else that a CLIP is asked, on a pack's text encoder and on its twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import relative, run_node

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.weights import qwen3
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_text_encoder, read_weights

pytestmark = pytest.mark.host

SEEDLING = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
SIZES = synthetic.TextGeometry(hidden=64, mlp=64, heads=1, key_heads=1, layers=29)
PROMPTS = ("a tree", "a small tree " * 180)
SAMPLING = {
    "sampling_mode": "on",
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.0,
    "repetition_penalty": 1.1,
    "seed": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    synthetic.write_text_encoder(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def twin(comfy: Any, folder: Path) -> Any:
    """ComfyUI's own encoder with all layers, dense."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.flux as flux_text

    pack, sizes = open_text_encoder(folder, whole=True)
    weights = {n: w.dequantize() if isinstance(w, PackedWeight) else w.float() for n, w in read_weights(pack).items()}
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(flux_text.KleinTokenizer, flux_text.klein_te()),
        state_dict=[weights],
        model_options={"qwen3_4b_model_config": sizes, "dtype": torch.float32},
    )


@pytest.fixture
def ours(comfy: Any, folder: Path) -> Any:
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    comfy.model_management.unload_all_models()
    return load_bonsai_text_encoder(folder, compute_dtype="fp32")


def generate(clip: Any, prompt: str, sampling: dict | None = None) -> str:
    mode = sampling or {"sampling_mode": "off"}
    return run_node(
        "comfy_extras.nodes_textgen.TextGenerate", clip=clip, prompt=prompt, max_length=6, sampling_mode=mode
    )


def encode(clip: Any) -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize("a tree"))[0][0]


def weights_held(clip: Any) -> int:
    return sum(p.nbytes for p in clip.cond_stage_model.parameters())


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
def test_text_is_that_of_the_twin(ours: Any, twin: Any, sampling: dict | None) -> None:
    """Of all layers, for prompts of any length; embeddings before and after are to the bit the same."""
    before, held = encode(ours), weights_held(ours)
    for prompt in PROMPTS:
        assert generate(ours, prompt, sampling) == generate(twin, prompt, sampling)
    assert torch.equal(encode(ours), before) and relative(before, encode(twin)) < 1e-5
    assert weights_held(ours) == held and len(ours.cond_stage_model.qwen3_4b.transformer.model.layers) == qwen3.LAYERS


def test_the_last_layers_are_read_for_text_only(ours: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and not before."""
    caplog.set_level("INFO")
    encode(ours)
    assert not any("for generating text" in r.message for r in caplog.records)
    generate(ours, "a tree")
    generate(ours.clone(), "a tree")
    (line,) = [r.message for r in caplog.records if "for generating text" in r.message]
    assert "layers 28 to 29" in line


@pytest.mark.parametrize("layer", ["layers.3.mlp.down_proj", "embed_tokens"])
def test_a_lora_changes_the_text_as_in_the_twin(ours: Any, twin: Any, layer: str) -> None:
    """Also that of the embedding, with whose table ComfyUI computes the logits."""
    key = f"qwen3_4b.transformer.model.{layer}.weight"
    shape = ours.cond_stage_model.get_submodule(key.removesuffix(".weight")).weight.shape
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    texts = []
    for clip in (ours, twin):
        changed = clip.clone()
        assert changed.add_patches({key: ("diff", (difference,))}, 1.0) == [key]
        texts.append(generate(changed, "a tree"))
    assert texts[0] == texts[1] and generate(ours, "a tree") == generate(twin, "a tree")


def test_a_merge_generates_nothing(ours: Any, twin: Any, folder: Path) -> None:
    """Its last layers would be those of one text encoder."""
    merging = {"clip1": ours, "clip2": twin, "ratio": 0.4}
    merged = run_node("comfy_extras.nodes_model_merging.CLIPMergeSimple", **merging)
    with pytest.raises(ValueError, match=r"is a merge .* Generate text with one of the text encoders"):
        generate(merged, "a tree")
    assert generate(ours, "a tree") == generate(twin, "a tree")


@pytest.mark.parametrize("layer", [-1, -2, -24])
def test_clip_set_last_layer(ours: Any, twin: Any, layer: int) -> None:
    """Klein's states are of fixed layers: the node changes neither."""
    found, truth = (run_node("nodes.CLIPSetLastLayer", clip=clip, stop_at_clip_layer=layer) for clip in (ours, twin))
    assert relative(encode(found), encode(truth)) < 1e-5


@pytest.mark.parametrize("missing", ["layers.28.", "layers.27.", "model.norm."])
def test_a_file_without_all_layers(comfy: Any, folder: Path, tmp_path: Path, missing: str) -> None:
    """Prompts are read as ever; text is refused in a sentence, again and again."""
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if missing not in n}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 29}')
    clip = load_bonsai_text_encoder(tmp_path)
    for _ in range(2):
        with pytest.raises(PackError, match=r"model\.safetensors: cannot generate text: .*CLIPLoader"):
            generate(clip, "a tree")
    assert torch.equal(encode(clip), encode(load_bonsai_text_encoder(folder)))


def test_the_shipped_encoder_generates_nothing(comfy: Any) -> None:
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    with pytest.raises(PackError, match=r"holds 27 layers and no final norm, enough for prompts only\. .*CLIPLoader"):
        generate(load_bonsai_text_encoder(SEEDLING), "a tree")
