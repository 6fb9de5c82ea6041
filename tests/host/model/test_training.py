"""The parts that `training` makes compute in ComfyUI, from their files, what they computed while they learned."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file
from twins import relative

from bonsai_ops.host.loader import load_bonsai_model
from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
from bonsai_ops.host.vae import load_vae
from bonsai_ops.tools.environment import PLUGIN
from training import export, text_encoder, transformer, unpack, vae
from training.checkpoint import Checkpoint

pytestmark = pytest.mark.host
PROMPTS = (
    "two red bonsai trees in blue pots, snowy",
    "A zebra beside a bonsai, in a quantum laboratory.",  # words that no caption has
    "",
)


def half_precision(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter rounded to bf16, as the files keep those that are not packed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def test_text_encoder(tmp_path: Path, comfyui_path: Path) -> None:
    """Trimmed vocabulary, 4-bit matrices, layers 9, 18 and 27 of all 512 positions."""
    torch.manual_seed(0)
    tokenizer = text_encoder.tokenizer(comfyui_path)
    (tmp_path / "vocabulary.json").write_text(str(text_encoder.Vocabulary.collect(tokenizer, 100).ids))
    vocabulary = text_encoder.load_vocabulary(tmp_path, tokenizer)
    encoder = half_precision(text_encoder.Encoder(len(vocabulary.ids) + 1))
    Checkpoint(tmp_path / "text_encoder.pt", encoder=encoder).save(1)
    export.export_text_encoder(tmp_path, comfyui_path, tmp_path / export.TEXT_ENCODER_FOLDER)
    encoder, vocabulary = text_encoder.load(tmp_path, tokenizer)
    clip = load_bonsai_text_encoder(tmp_path, compute_dtype="fp32")
    for prompt in PROMPTS:
        rows, length = vocabulary.encode(tokenizer, prompt, 512)
        with torch.no_grad():
            truth = encoder(torch.tensor([rows]), torch.tensor([length]))
            found = clip.encode_from_tokens(clip.tokenize(prompt))
        assert found.shape == truth.shape == (1, 512, 3 * text_encoder.HIDDEN)
        assert relative(found, truth) < 1e-4, prompt


def test_capitals_are_read_as_small_letters(tmp_path: Path, comfyui_path: Path) -> None:
    """A capitalized first word, rare in captions, has the row of the small one; every other row is as it was."""
    torch.manual_seed(0)
    tokenizer = text_encoder.tokenizer(comfyui_path)
    plain = text_encoder.Vocabulary.collect(tokenizer, 300)
    encoder = text_encoder.Encoder(len(plain.ids) + 1)
    wider, vocabulary = text_encoder.with_capitals(encoder, plain, tokenizer)
    old, new = encoder.model.embed_tokens.weight, wider.model.embed_tokens.weight
    (large,), (small,) = (tokenizer(word)["input_ids"] for word in ("Two", " two"))
    assert torch.equal(new[vocabulary.rows[large]], old[plain.rows[small]])
    copied = set(text_encoder.small_tokens(tokenizer))
    for number in set(plain.ids) - copied:
        assert torch.equal(new[vocabulary.rows[number]], old[plain.rows[number]])
    assert torch.equal(new[0], old[0]) and len(copied) > 20 and vocabulary.ids == sorted(vocabulary.ids)
    again, same = text_encoder.with_capitals(wider, vocabulary, tokenizer)
    assert same.ids == vocabulary.ids and torch.equal(again.model.embed_tokens.weight, new)


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_transformer(scheme: str, tmp_path: Path) -> None:
    """The straight-through weights of the training are the packed weights of the file."""
    model, _ = transformer.parametrized(scheme)
    half_precision(model)
    Checkpoint(tmp_path / f"{scheme}.pt", average=model).save(1)
    export.export_transformer(tmp_path, scheme, tmp_path / "model.safetensors")
    patcher = load_bonsai_model(tmp_path / "model.safetensors", {"compute_dtype": "fp32"})
    assert patcher.get_attachment("bonsai").scheme == scheme
    generator = torch.Generator().manual_seed(1)
    width, height, sigma = 96, 64, torch.tensor([0.7])
    tokens = torch.randn(1, width * height // 256, 128, generator=generator)
    text = torch.randn(1, 24, 3 * text_encoder.HIDDEN, generator=generator)
    comfy.model_management.load_models_gpu([patcher])
    with torch.no_grad():
        truth = transformer.predict(model, tokens, sigma, text, width, height)
        picture = tokens.transpose(1, 2).unflatten(2, (height // 16, width // 16))
        found = patcher.model.diffusion_model(picture, sigma, text)
    assert relative(found.flatten(2).transpose(1, 2), truth) < 1e-5


def test_vae(tmp_path: Path) -> None:
    """Decoding and encoding: ComfyUI's wider class, filled up with zeros, and statistics folded into the encoder."""
    torch.manual_seed(0)
    model = vae.Autoencoder().eval()
    for parameter in model.parameters():
        if not parameter.any():  # convolutions that begin with nothing
            torch.nn.init.normal_(parameter, std=0.05)
    model.mean.normal_()
    model.deviation.uniform_(0.5, 2)
    last = model.taesd_encoder[-1]
    with torch.no_grad():  # as the file has it: folded, then rounded
        deviation = model.deviation.view(-1, 1, 1, 1)
        last.weight.copy_((last.weight / deviation).bfloat16() * deviation)
        last.bias.copy_(((last.bias - model.mean) / model.deviation).bfloat16() * model.deviation + model.mean)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"taesd_encoder.{len(model.taesd_encoder) - 1}."):
            parameter.data.copy_(parameter.bfloat16())
    Checkpoint(tmp_path / "vae.pt", model=model).save(1)
    vae.export(tmp_path, tmp_path / "vae")
    stock = load_vae(tmp_path)
    assert stock.latent_channels == 128 and stock.downscale_ratio == stock.upscale_ratio == 16
    latents = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(2))
    found = (stock.decode(latents) * 255).round().to(torch.int16)
    truth = torch.from_numpy(vae.decode(model, latents)).to(torch.int16)
    assert found.shape == (1, 64, 96, 3) and int((found - truth).abs().max()) <= 1
    picture = torch.randint(0, 256, truth.shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    assert relative(stock.encode(picture / 255), vae.encode(model, picture.numpy())) < 1e-4


def test_training_goes_on_from_the_shipped_files(tmp_path: Path, comfyui_path: Path) -> None:
    """Unpacked and exported again, every file is the same."""
    models = PLUGIN / "bonsai_ops" / "models"
    unpack.unpack(tmp_path, models)
    export.pack(tmp_path, comfyui_path, tmp_path / "models")
    again = sorted(path for path in (tmp_path / "models").rglob("*.safetensors"))
    assert len(again) == 4
    for path in again:
        shipped, found = load_file(models / path.relative_to(tmp_path / "models")), load_file(path)
        assert shipped.keys() == found.keys()
        assert [name for name in shipped if not torch.equal(shipped[name], found[name])] == []
