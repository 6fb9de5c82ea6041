"""The shipped files -> checkpoints, so that training can go on from them where no work folder is left.

Masters begin at the packed values: three levels round to themselves, and so do 4 bits.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from bonsai_ops.weights import flux2
from bonsai_ops.weights.codec import spread_fields
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

from . import export, text_encoder, transformer, vae
from .checkpoint import Checkpoint


def unpack(work: Path, models: Path) -> None:
    """Writes the checkpoints that are missing; those of the transformers begin at step 0."""
    folder = models / export.FOLDER
    if not (work / "vae.pt").is_file():
        Checkpoint(work / "vae.pt", model=read_vae(folder)).save(vae.STEPS)
    if not (work / "text_encoder.pt").is_file():
        ids, encoder = read_text_encoder(folder)
        (work / "vocabulary.json").write_text(json.dumps(ids), encoding="utf-8")
        Checkpoint(work / "text_encoder.pt", encoder=encoder).save(text_encoder.STEPS)
    for scheme, name in (("ternary", export.TRANSFORMER_FILE), ("binary", export.BINARY_FILE)):
        if (folder / name).is_file() and not (work / f"{scheme}.pt").is_file():
            model, _ = transformer.parametrized(scheme)
            tensors = read_values(folder / name)
            masters = {n: n.replace(".parametrizations.weight.original", ".weight") for n in model.state_dict()}
            model.load_state_dict({name: tensors[plain] for name, plain in masters.items()})
            Checkpoint(work / f"{scheme}.pt", model=model, average=model).save(0)


def read_vae(folder: Path) -> vae.Autoencoder:
    """The shipped VAE; its statistics are folded into the encoder already."""
    model = vae.Autoencoder()
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    model.load_state_dict({**model.state_dict(), **{name: tensor.float() for name, tensor in tensors.items()}})
    return model


def read_text_encoder(folder: Path) -> tuple[list[int], text_encoder.Encoder]:
    """(the tokens of the trimmed vocabulary, the encoder with its 4-bit values as masters)."""
    tensors = load_file(folder / export.TEXT_ENCODER_FOLDER / "model.safetensors")
    ids = tensors["model.embed_tokens.token_ids"].tolist()
    encoder = text_encoder.Encoder(len(ids) + 1)
    state = {}
    for name, old in encoder.state_dict().items():
        layer = name.replace(".parametrizations.weight.original", ".weight").removesuffix(".weight")
        if f"{layer}.scales" in tensors:
            codes = spread_fields(tensors[f"{layer}.weight"].view(torch.uint8), text_encoder.BITS).float()
            scale, bias = (tensors[f"{layer}.{part}"].float()[..., None] for part in ("scales", "biases"))
            state[name] = (codes.unflatten(1, (-1, text_encoder.GROUP)) * scale + bias).flatten(1)
        else:
            state[name] = tensors[f"{layer}.weight"].float() if f"{layer}.weight" in tensors else old
    encoder.load_state_dict(state)
    return ids, encoder


def read_values(path: Path) -> dict[str, torch.Tensor]:
    """{diffusers name: fp32 weight} of a pack of any format."""
    pack = open_transformer(path)
    weights = read_weights(pack)
    values = {n: w.dequantize() if isinstance(w, PackedWeight) else w.float() for n, w in weights.items()}
    return flux2.to_diffusers(flux2.measure(pack.path, pack.entries), values)
