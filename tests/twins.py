"""Tiny packed models inside a real ComfyUI, each beside a dense twin: the same weights in fp32, loaded by ComfyUI.

Everything runs in this process, through ComfyUI's own nodes where there is one, on the device that ComfyUI computes on:
`load_device`, usually the processor, so that "offloaded" means what ComfyUI's lowvram code does to a module, without a
second memory; dynamic VRAM needs CUDA (BONSAI_TEST_DEVICE=cuda-dynamic) and is else only imitated, by the attributes
that its `load` sets.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import NEWEST, comfyui_version
from bonsai_ops.weights import codec, flux2
from bonsai_ops.weights.formats import native
from bonsai_ops.weights.packed_weight import PackedWeight

SMALL = flux2.Geometry(hidden=128, context=128, in_channels=128, double_blocks=2, single_blocks=3)
VARIANTS = ("binary", "ternary", "affine")
TOLERANCE = 1e-5
"""Relative L2 distance to the dense twin, fp32."""
TOKENS, LATENT = 12, (1, 128, 4, 6)
QKV = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
PROJ = "diffusion_model.double_blocks.1.txt_attn.proj.weight"
LINEAR1 = "diffusion_model.single_blocks.0.linear1.weight"
LINEAR2 = "diffusion_model.single_blocks.2.linear2.weight"
DENSE = "diffusion_model.double_stream_modulation_img.lin.weight"


def absent(what: str) -> None:
    """Skips the test in an older ComfyUI, which has no `what`; fails in the newest, which is known to have it."""
    import comfy

    version = comfyui_version(Path(comfy.__path__[0]).parent)
    assert version != NEWEST, f"ComfyUI {version} has lost {what}: adapt the test"
    pytest.skip(f"ComfyUI {version} has no {what}")


def load_device() -> torch.device:
    """Where the ComfyUI in this process computes."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """L2 distance relative to the truth, wherever they lie."""
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    return float((found - truth).norm() / truth.norm())


def write_pack(path: Path, variant: str, geometry: flux2.Geometry = SMALL, seed: int = 0) -> Path:
    """A transformer file of random codes: MLX for binary and ternary, native for affine."""
    if variant != "affine":
        synthetic.write_mlx(path, variant, geometry, seed)
        return path
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, PackedWeight | torch.Tensor] = {}
    for name, shape in flux2.expected_shapes(geometry).items():
        if flux2.is_block_linear(name):
            codes = torch.randint(0, 4, shape, dtype=torch.uint8, generator=generator)
            scale = synthetic.magnitudes(*shape, generator).bfloat16()
            weights[name] = PackedWeight(
                codec.encode("crumb", codes), scale, shape, "affine", "crumb", 128, (-1.5 * scale.float()).bfloat16()
            )
        else:
            weights[name] = synthetic.dense_tensor(shape, generator)
    native.write(path, weights, native.make_record(weights))
    return path


def read_dense(path: Path) -> dict[str, torch.Tensor]:
    """{BFL name: fp32 weight} of a pack."""
    from bonsai_ops.weights.read import open_transformer, read_weights

    weights = read_weights(open_transformer(path))
    return {n: w.dequantize() if isinstance(w, PackedWeight) else w.float() for n, w in weights.items()}


def load_stock(state_dict: Mapping[str, torch.Tensor]) -> Any:
    """ComfyUI's own ModelPatcher around these weights, in fp32."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.clone() for name, tensor in state_dict.items()}, model_options={"dtype": torch.float32}
    )
    return model


def stock_text_encoder(file: Path, geometry: synthetic.TextGeometry) -> Any:
    """ComfyUI's own CLIP of all layers that the file of a packed text encoder holds, in fp32."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.flux

    from bonsai_ops.host.text_encoder import TruncatingTokenizer
    from bonsai_ops.weights.formats import open_pack

    weights = {name: entry.weight() for name, entry in open_pack(file).entries.items()}
    state = {n: w.dequantize() if isinstance(w, PackedWeight) else w.float() for n, w in weights.items()}
    sizes = {
        "vocab_size": geometry.vocabulary,
        "hidden_size": geometry.hidden,
        "num_hidden_layers": geometry.layers,
        "intermediate_size": geometry.mlp,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.key_heads,
    }
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(TruncatingTokenizer, comfy.text_encoders.flux.klein_te()),
        state_dict=[state],
        model_options={"qwen3_4b_model_config": sizes, "dtype": torch.float32},
    )


def unpadded(forward: Callable, x: Any, timestep: Any, context: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """A wrapper of a diffusion model: without the zeros before a text that ComfyUI makes 512 tokens long."""
    filled = context.ne(0).any(dim=2).any(dim=0)
    first = int(filled.int().argmax()) if filled.any() else -1
    return forward(x, timestep, context[:, first:], *rest, **options)


def with_short_texts(model: Any) -> Any:
    """The same MODEL, `unpadded`: the zeros take most of the time of a tiny model, and nothing else than it."""
    import comfy.patcher_extension

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "short texts", unpadded)
    return model


@dataclass(frozen=True)
class Pair:
    """A packed model and its dense twin, freshly loaded. `path`: the pack."""

    path: Path
    packed: Any
    dense: Any

    def both(self, change: Callable[[Any], Any]) -> Pair:
        """The pair of what `change` makes of each."""
        return Pair(self.path, change(self.packed), change(self.dense))

    def check(self, tolerance: float = TOLERANCE, **settings: Any) -> torch.Tensor:
        """Samples both, compares them and returns what the packed model drew."""
        found, truth = draw(self.packed, **settings), draw(self.dense, **settings)
        assert relative(found, truth) < tolerance
        return found


def text(seed: int = 1, batch: int = 1, width: int = SMALL.context) -> list:
    """A CONDITIONING of random text states. ComfyUI before 0.24 asks for the key "pooled_output"."""
    states = torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(seed))
    return [[states, {"pooled_output": None}]]


def latent(seed: int | None = None, batch: int = 1) -> dict[str, torch.Tensor]:
    """An empty LATENT, or one with random content."""
    shape = (batch, *LATENT[1:])
    return {
        "samples": torch.zeros(shape)
        if seed is None
        else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    }


def draw(
    model: Any,
    *,
    positive: list | None = None,
    negative: list | None = None,
    start: dict | None = None,
    steps: int = 2,
    cfg: float = 1.0,
    denoise: float = 1.0,
    sampler_name: str = "euler",
    scheduler: str = "simple",
) -> torch.Tensor:
    """What ComfyUI's KSampler node makes of the latent `start`."""
    return run_node(
        "nodes.KSampler",
        model=model,
        seed=5,
        steps=steps,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler=scheduler,
        positive=positive or text(),
        negative=negative or text(2),
        latent_image=start or latent(),
        denoise=denoise,
    )["samples"]


def run_node(name: str, /, **inputs: Any) -> Any:
    """Calls a node of ComfyUI, such as "comfy_extras.nodes_flux.Flux2Scheduler", and returns its first output.

    Skips the test where an older ComfyUI has no such node.
    """
    return run_node_outputs(name, **inputs)[0]


def run_node_outputs(name: str, /, **inputs: Any) -> tuple:
    """All outputs of a node, V1 or V3."""
    module_name, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        absent(f"node {name}")
    if hasattr(found, "define_schema"):
        outputs = found.execute(**inputs).result
    else:
        method = getattr(found(), found.FUNCTION)
        known = inspect.signature(method).parameters
        outputs = method(**{name: value for name, value in inputs.items() if name in known})
    return tuple(outputs or ())


def with_lora(model: Any, name: str, strength: float = 1.0) -> Any:
    """The model behind ComfyUI's LoraLoaderModelOnly."""
    return run_node("nodes.LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def low_rank(
    layers: Mapping[str, tuple[int, int]],
    *,
    names: tuple[str, str] = ("lora_B.weight", "lora_A.weight"),
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA on `layers` {prefix in the file: (rows, columns)}; its effect is about that of the weight.

    names: what up and down are called.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for prefix, (rows, columns) in layers.items():
        tensors[f"{prefix}.{names[0]}"] = torch.randn(rows, rank, generator=generator).to(dtype)
        tensors[f"{prefix}.{names[1]}"] = (torch.randn(rank, columns, generator=generator) / columns**0.5 / 2).to(dtype)
        if alpha is not None:
            tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    return tensors


HIDDEN = SMALL.hidden
SHAPES = {
    f"diffusion_model.{n}": s
    for n, s in flux2.expected_shapes(SMALL).items()
    if flux2.is_block_linear(n) or n.endswith("lin.weight")
}
"""{key: (rows, columns)} of every packed layer and of the dense modulation layers."""


def bfl_lora(**options: Any) -> dict[str, torch.Tensor]:
    """A LoRA on every block layer and on the dense modulation, BFL names."""
    return low_rank({key.removesuffix(".weight"): shape for key, shape in SHAPES.items()}, **options)


def loaded(model: Any, memory: float = 0) -> Any:
    """The model loaded through ComfyUI's patcher. memory: 0 resident, else bytes that may be resident.

    Skips the test where dynamic VRAM decides how much that is.
    """
    if memory and model.is_dynamic():
        pytest.skip("dynamic VRAM decides itself what is resident")
    model.patch_model(model.load_device, lowvram_model_memory=memory)
    return model


def imitate_dynamic(model: Any) -> None:
    """What ModelPatcherDynamic.load sets on each module: the patch in weight_lowvram_function, no weight functions."""
    from comfy.model_patcher import LowVramPatch

    for name, module in model.model.named_modules():
        if hasattr(module, "comfy_cast_weights") and getattr(module, "weight", None) is not None:
            key = f"{name}.weight"
            patch = LowVramPatch(key, model.patches) if key in model.patches else None
            module.weight_lowvram_function = patch
            module.weight_function = []
            module.seed_key = name


def unloaded(model: Any) -> Any:
    """The model after ComfyUI took it off the device."""
    model.detach()
    return model


def predict(model: Any, seed: int = 3) -> torch.Tensor:
    """One step of a model that is loaded already: no sampler, no model management in between."""
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(seed))
    given = (tensor.to(model.load_device) for tensor in (x, torch.tensor([0.7]), text()[0][0]))
    with torch.inference_mode():
        x, sigma, states = given
        return model.model.apply_model(x, sigma, c_crossattn=states)


def module_of(model: Any, key: str) -> torch.nn.Module:
    """The module whose weight has this key."""
    return model.model.get_submodule(key.rpartition(".")[0])


def state_bytes(model: Any) -> dict[str, torch.Tensor]:
    """A deep copy of the model's state dict."""
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in model.model.state_dict().items()}


def same_state(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Equal to the bit, wherever they lie."""
    return a.keys() == b.keys() and all(torch.equal(a[n].cpu(), b[n].cpu()) and a[n].dtype == b[n].dtype for n in a)


def packed_layers(model: Any) -> int:
    """How many modules hold a packed weight now."""
    from bonsai_ops.host.layout import is_packed

    return sum(is_packed(getattr(m, "weight", None)) for m in model.model.modules())
