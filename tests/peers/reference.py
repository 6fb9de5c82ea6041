"""Run diffusers' Flux2KleinPipeline in fp32 on the CPU: the truth of the parity tests.

The initial noise is torch.randn([1, 128, H/16, W/16]) from a CPU generator, as ComfyUI draws it. The pipeline's own
step callback hands out the denoised latent, before the VAE's batch-norm statistics are applied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

OUT_LAYERS = (9, 18, 27)
MAX_TOKENS = 512


def initial_noise(width: int, height: int, seed: int) -> torch.Tensor:
    """Noise [1, 128, height/16, width/16] fp32; width and height in pixels."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn([1, 128, height // 16, width // 16], generator=generator)


def reference_latent(
    folder: Path,
    prompt: str | None,
    width: int,
    height: int,
    steps: int = 4,
    seed: int = 0,
    image: Any = None,
    *,
    prompt_embeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Sample the unpacked pipeline in `folder`; width and height in pixels, multiples of 16.

    `image` is a PIL image or a list of them (editing). Pass `prompt_embeds` [1, 512, D] with prompt None to use another
    text encoder. Returns the final latent [1, 128, H/16, W/16] fp32 in ComfyUI's layout, the decoded picture
    [H, W, 3] uint8 (rounded to nearest) and the prompt embeddings [1, 512, D] fp32.
    """
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if prompt_embeds is not None:
        prompt_embeds = prompt_embeds.float()
    last: dict[str, torch.Tensor] = {}

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last.update(tensors)
        return {}

    pictures = pipeline(
        prompt=prompt,
        image=image,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=initial_noise(width, height, seed),
        prompt_embeds=prompt_embeds,
        max_sequence_length=MAX_TOKENS,
        text_encoder_out_layers=OUT_LAYERS,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="pil",
    ).images
    latent = last["latents"].transpose(1, 2).reshape(1, 128, height // 16, width // 16)
    return latent, np.asarray(pictures[0]), last["prompt_embeds"]


def load_text_encoder(folder: Path, *, hqq_dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Qwen3ForCausalLM in fp32 from a pack folder: text_encoder/, text_encoder-hqq-4bit/ or text_encoder-mlx-4bit/.

    4-bit weights are dequantized by hqq or mlx. hqq computes (code - zero) * scale in `hqq_dtype`; its own loader uses
    float16, which rounds the weight, float32 evaluates the formula without rounding. mlx gets fp32 scales and biases.
    """
    from transformers import Qwen3ForCausalLM

    folder = Path(folder)
    if (folder / "text_encoder").is_dir():
        return Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    if (folder / "text_encoder-hqq-4bit").is_dir():
        source = folder / "text_encoder-hqq-4bit"
        state = hqq_state(source / "qmodel.pt", dtype=hqq_dtype)
    elif (folder / "text_encoder-mlx-4bit").is_dir():
        source = folder / "text_encoder-mlx-4bit"
        state = mlx_state(source)
    else:
        raise FileNotFoundError(f"{folder} has no text_encoder, text_encoder-hqq-4bit or text_encoder-mlx-4bit folder")
    return _text_encoder_from_state(source / "config.json", state)


def _text_encoder_from_state(config_file: Path, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = json.loads(config_file.read_text(encoding="utf-8"))
    for key in ("quantization", "quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    model = Qwen3ForCausalLM(Qwen3Config(**config)).float().eval()
    missing, unexpected = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"text encoder in {config_file.parent}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def hqq_state(qmodel: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """State dict of a qmodel.pt, 4-bit layers dequantized by hqq computing in `dtype`."""
    from hqq.core.quantize import HQQLinear

    state: dict[str, torch.Tensor] = {}
    for name, module in torch.load(qmodel, map_location="cpu", weights_only=True).items():
        if "W_q" in module:
            layer = HQQLinear(linear_layer=None, quant_config=None, compute_dtype=dtype, device="cpu")
            layer.load_state_dict(dict(module))
            state[f"{name}.weight"] = layer.dequantize().detach()
        else:
            state.update({f"{name}.{key}": tensor.detach() for key, tensor in module.items()})
    return state


def mlx_state(source: Path) -> dict[str, torch.Tensor]:
    """State dict of a text_encoder-mlx-4bit folder, dequantized by mlx in fp32."""
    from .mlx_pack import dequantize, to_mlx

    quantization = json.loads((source / "config.json").read_text(encoding="utf-8"))["quantization"]
    state: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            layer, _, leaf = name.rpartition(".")
            if leaf in ("scales", "biases"):
                continue
            if f"{layer}.scales" in names:
                parts = {part: to_mlx(file.get_tensor(f"{layer}.{part}")) for part in ("weight", "scales", "biases")}
                state[name] = dequantize(parts, quantization["bits"], quantization["group_size"])
            else:
                state[name] = file.get_tensor(name)
    return state


def reference_embeds(
    folder: Path, prompt: str, *, tokenizer: Path | None = None, hqq_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Prompt embeddings [1, 512, 3*hidden] fp32 of the text encoder in a pack folder.

    The tokenizer is read from `tokenizer`, else from the pack. `hqq_dtype` as in `load_text_encoder`.
    """
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen2TokenizerFast

    folder = Path(folder)
    places = (tokenizer, folder / "tokenizer", folder / "text_encoder-hqq-4bit" / "tokenizer")
    place = next((p for p in places if p is not None and Path(p).is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{folder} has no tokenizer folder; pass tokenizer=")
    with torch.no_grad():
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(
            text_encoder=load_text_encoder(folder, hqq_dtype=hqq_dtype),
            tokenizer=Qwen2TokenizerFast.from_pretrained(place),
            prompt=prompt,
            dtype=torch.float32,
            max_sequence_length=MAX_TOKENS,
            hidden_states_layers=list(OUT_LAYERS),
        )
