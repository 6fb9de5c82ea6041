"""A tiny random FLUX.2 Klein pipeline on disk, in the layout of the unpacked packs (diffusers names, 16 bit).

    model_index.json  manifest.json
    scheduler/scheduler_config.json
    tokenizer/                                          Qwen2 BPE with Qwen3's chat template
    text_encoder/{config.json, model.safetensors}       Qwen3ForCausalLM, bf16, tied embeddings
    transformer/{config.json, diffusion_pytorch_model.safetensors}   bf16
    vae/{config.json, diffusion_pytorch_model.safetensors}           bf16

The linears of the blocks hold {-s, +s} (binary) or {-s, 0, +s} (ternary, a third zeros) with one bf16-exact s per 128
consecutive inputs of a row, so the bf16 file is the exact model. One ternary group is all zero.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

GROUP = 128
VARIANTS = ("ternary", "binary")
VAE_CHANNELS = (32, 64, 128, 128)

# What the Qwen3 template does for user turns; tools and reasoning traces are left out.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)

SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def is_quantized(name: str) -> bool:
    """Whether the packs quantize the tensor `name` (diffusers name with `.weight`): every linear inside a block."""
    in_block = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    return in_block and name.endswith(".weight") and ".norm_" not in name


def quantized_weight(shape: tuple[int, int], variant: str, generator: torch.Generator) -> torch.Tensor:
    """Random weight [N, K] bf16 of {-s, +s} or {-s, 0, +s}; s is about 0.7 / sqrt(K), one per 128 of K."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {VARIANTS}")
    rows, columns = shape
    groups = columns // GROUP
    spread = torch.rand(rows, groups, 1, generator=generator) + 0.5
    scale = (0.7 * columns**-0.5 * spread).to(torch.bfloat16)
    if variant == "binary":
        sign = torch.randint(0, 2, (rows, groups, GROUP), generator=generator) * 2 - 1
    else:
        sign = torch.randint(-1, 2, (rows, groups, GROUP), generator=generator)
    return (sign.to(torch.bfloat16) * scale).reshape(rows, columns) + 0.0  # + 0.0: no negative zeros


def _gain(name: str) -> float:
    # Gates of order one, so that an error in any packed layer moves the picture far more than fp32 rounding does.
    if "stream_modulation" in name:
        return 3.0
    return 0.5 if name.startswith("context_embedder") else 1.0


def build_transformer(
    *, heads: int, depth: int, depth_single: int, text_dim: int, seed: int, variant: str | None
) -> torch.nn.Module:
    """Flux2Transformer2DModel in bf16 with `heads` heads of 128; `variant` None leaves the linears dense."""
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=depth,
        num_single_layers=depth_single,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        eps=1e-6,
        guidance_embeds=False,
    ).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            value = 1 + 0.1 * torch.randn(tensor.shape, generator=generator)
        elif variant is not None and is_quantized(name):
            value = quantized_weight(tuple(tensor.shape), variant, generator)
        else:
            value = torch.randn(tensor.shape, generator=generator) * _gain(name) * tensor.shape[1] ** -0.5
        state[name] = value.to(torch.bfloat16)
    if variant == "ternary" and depth:
        state["transformer_blocks.0.attn.to_q.weight"][0, :GROUP] = 0
    model.load_state_dict(state)
    return model.eval()


def build_text_encoder(*, hidden: int, layers: int, seed: int) -> torch.nn.Module:
    """Qwen3ForCausalLM in bf16: 2 heads of 128, 1 key/value head, vocabulary 151936, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        initializer_range=0.05,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model.to(torch.bfloat16).eval()


def build_vae(*, seed: int) -> torch.nn.Module:
    """AutoencoderKLFlux2 in bf16: channels (32, 64, 128, 128), 32 latent channels, non-trivial latent statistics."""
    from diffusers import AutoencoderKLFlux2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLFlux2(block_out_channels=VAE_CHANNELS, layers_per_block=2, latent_channels=32)
        vae.bn.running_mean.normal_(0.0, 0.5)
        vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.to(torch.bfloat16).eval()


def build_tokenizer(source: Path) -> object:
    """Qwen2 tokenizer read from `source` (vocab.json, merges.txt, tokenizer_config.json), Qwen3 chat template."""
    from transformers import Qwen2TokenizerFast

    tokenizer = Qwen2TokenizerFast.from_pretrained(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_pipeline(
    folder: Path,
    *,
    tokenizer: Path | None = None,
    heads: int = 2,
    depth: int = 1,
    depth_single: int = 2,
    te_hidden: int = 256,
    te_layers: int = 28,
    seed: int = 0,
    variant: str | None = "ternary",
) -> None:
    """Write the pipeline into `folder`.

    `tokenizer` is a folder with a Qwen2 tokenizer, for one ComfyUI's comfy/text_encoders/qwen25_tokenizer; without it
    no tokenizer/ is written and prompts cannot be encoded. `variant` None writes dense random linears. The text
    encoder needs at least 28 layers, else hidden states 9, 18 and 27 do not exist.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = build_transformer(
        heads=heads, depth=depth, depth_single=depth_single, text_dim=3 * te_hidden, seed=seed, variant=variant
    )
    transformer.save_pretrained(folder / "transformer")
    build_text_encoder(hidden=te_hidden, layers=te_layers, seed=seed + 1).save_pretrained(folder / "text_encoder")
    _write_config_of_transformers_4(folder / "text_encoder" / "config.json")
    build_vae(seed=seed + 2).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    if tokenizer is not None:
        build_tokenizer(Path(tokenizer)).save_pretrained(folder / "tokenizer")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "Flux2KleinPipeline",
            "is_distilled": True,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    )
    write_manifest(folder, f"{variant or 'dense'} g128 (bf16 master)")


def _write_config_of_transformers_4(path: Path) -> None:
    """Rewrite a text encoder config.json with the key names of the published files (rope_theta, torch_dtype)."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    write_json(path, config)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path, model_version: str) -> None:
    """Write manifest.json: the version and the files of `folder`."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    write_json(folder / "manifest.json", {"model_version": model_version, "files": files})
