"""The linear layers of a MODEL: which are packed and why the others stay, and their dense weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import comfy.lora
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quantize import GROUP_SIZES, Quantized, budget, fitting_group
from .. import comfyui
from ..layout import is_packed, unwrap
from ..linear import PackedLinear
from ..lora import merges_models
from ..tensors import PREFIX, base_tensor, base_tensors, linear_modules
from .options import PatchOptions

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

COLUMN_SCALE = "pre_quant_scale"
"""A vector [K] of a linear layer of ComfyUI's: y = (x * scale) W^T + bias."""
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Classes of tensors that hold what they compute with."""
ROUNDING = ("input_scale",)
"""What a quantized layer rounds its inputs with; without rounding it has no part in the product."""


@dataclass
class Layer:
    """One linear layer of the source. kept: why it stays, None for one to be packed.

    made, recipe: what it became, and by which one. options: what it may become within a target size.
    """

    name: str
    module: torch.nn.Module
    kept: str | None = None
    made: Quantized | None = None
    recipe: str = ""
    options: list[budget.Option] = field(default_factory=list)

    @property
    def weight(self) -> str:
        """The name of its weight in the transformer."""
        return f"{self.name}.weight"

    @property
    def key(self) -> str:
        """ComfyUI's key of its weight, for patches."""
        return PREFIX + self.weight

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.weight.shape)

    @property
    def size(self) -> int:
        """Number of its weights."""
        return self.shape[0] * self.shape[1]


def linear_layers(source: ModelPatcher, twin: BaseModel, options: PatchOptions) -> list[Layer]:
    """Every linear layer of the source in model order, with the reason for those that stay.

    Raises ValueError for one that computes with more than a weight, a bias and what COLUMN_SCALE and ROUNDING name.
    """
    ours = dict(twin.diffusion_model.named_modules())
    layers = []
    for name, module in linear_modules(source):
        layer = Layer(name, module)
        _require_known(source, layer, ours.get(name))
        weight = base_tensor(source, layer.weight)
        excluded = next((p for p in options.exclude if fnmatch.fnmatchcase(name, p)), None)
        columns = weight.shape[1]
        if stays_packed(source, layer):
            layer.kept = "is packed already"
        elif not any(fnmatch.fnmatchcase(name, p) for p in options.include):
            layer.kept = "not included"
        elif excluded is not None:
            layer.kept = f"excluded by {excluded}"
        elif not isinstance(ours.get(name), PackedLinear):
            layer.kept = "not made through ComfyUI's operations"
        elif fitting_group(columns, options.group_size) is None:
            layer.kept = f"{columns} columns are no multiple of {GROUP_SIZES[-1]}"
        layers.append(layer)
    return layers


def stays_packed(patcher: ModelPatcher, layer: Layer) -> bool:
    """True if a layer is packed whenever the model is loaded. A merge of models turns it dense."""
    return is_packed(base_tensor(patcher, layer.weight)) and not merges_models(patcher.patches.get(layer.key, ()))


def packed_pairs(
    original: ModelPatcher, patched: ModelPatcher, layers: Sequence[Layer] | None = None
) -> list[tuple[Layer, Layer]]:
    """(packed layer, the layer of this name in the original), of all in model order.

    layers: those of the patched model, if they are known. Raises ValueError if nothing is packed or the models differ.
    """
    layers = [Layer(name, module) for name, module in linear_modules(patched)] if layers is None else layers
    packed = [layer for layer in layers if stays_packed(patched, layer)]
    if not packed:
        raise ValueError(
            'no layer of the patched model is packed: connect a model from "Patch to BitLinear" or from '
            '"Load Bonsai Model"'
        )
    found = {name: Layer(name, m) for name, m in linear_modules(original)}
    for layer in packed:
        other = found.get(layer.name)
        if other is None or other.shape != layer.shape:
            there = "missing" if other is None else str(list(other.shape))
            raise ValueError(
                f"{layer.name} is {list(layer.shape)} in the patched model and {there} in the original: connect "
                "the model that was patched"
            )
    return [(layer, found[layer.name]) for layer in packed]


def other_tensors(source: ModelPatcher, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    """{name: tensor} of the source's transformer that stays and is no weight of `layers`."""
    left_out = {layer.weight for layer in layers} | _spent(layers)
    return {name: tensor for name, tensor in base_tensors(source).items() if name not in left_out}


def tensors_to_keep(source: ModelPatcher, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    """{name: tensor} of the source's transformer as layers without scaled columns have it: these are multiplied in."""
    spent = _spent(layers)
    tensors = {name: tensor for name, tensor in base_tensors(source).items() if name not in spent}
    for layer in layers:
        if layer.made is None and column_scale(layer.module) is not None:
            tensors[layer.weight] = dense_weight(source, layer, source.offload_device)
    return tensors


def carried_out(source: ModelPatcher, layers: Sequence[Layer]) -> list[str]:
    """The keys of the weights whose patches are merges that were carried out when `dense_weight` read them."""
    read = [layer for layer in layers if layer.made is not None or column_scale(layer.module) is not None]
    return [layer.key for layer in read if merges_models(source.patches.get(layer.key, ()))]


def column_scale(module: torch.nn.Module) -> torch.Tensor | None:
    """What a linear layer of ComfyUI multiplies its inputs by, column by column, or None: AWQ's smoothing."""
    return getattr(module, COLUMN_SCALE, None) if comfyui.scales_columns() else None


def _spent(layers: Sequence[Layer]) -> set[str]:
    """Names of the tensors of linear layers that have no place beside a dense or packed weight."""
    return {f"{layer.name}.{leaf}" for layer in layers for leaf in (*ROUNDING, COLUMN_SCALE)}


def _require_known(source: ModelPatcher, layer: Layer, ours: torch.nn.Module | None) -> None:
    """Raises ValueError if the layer has a tensor that neither ours has nor its dense weight accounts for."""
    weight = base_tensor(source, layer.weight)
    if not (isinstance(weight, QuantizedTensor) or (type(weight) in PLAIN and weight.is_floating_point())):
        raise ValueError(
            f"{layer.weight} is a {type(weight).__name__} of {weight.dtype}, which Patch to BitLinear cannot unpack: "
            "load the model's 16-bit file, or one that ComfyUI's own loader unpacks, and patch that"
        )
    known = {"weight", "bias", *ROUNDING, *((COLUMN_SCALE,) if comfyui.scales_columns() else ())}
    known |= set() if ours is None else {*ours._parameters, *ours._buffers}
    for leaf, tensor in (*layer.module._parameters.items(), *layer.module._buffers.items()):
        if tensor is not None and leaf not in known:
            raise ValueError(
                f"{layer.name}.{leaf} is a tensor that Patch to BitLinear does not know, so what the layer computes "
                "is unknown too: patch a model whose linear layers have nothing but weight and bias, such as its "
                "16-bit file"
            )
    patches = source.patches.get(layer.key, ())
    changed = (patches and not merges_models(patches)) or source.weight_wrapper_patches.get(layer.key)
    if changed and column_scale(layer.module) is not None:
        raise ValueError(
            f"{layer.name} scales its inputs by {COLUMN_SCALE}, and ComfyUI would scale those of the LoRA on it too: "
            'connect the LoRA behind "Patch to BitLinear" instead of before it'
        )


def convolutions(source: ModelPatcher) -> int:
    """The number of its convolutions, which are never packed."""
    return sum(isinstance(m, torch.nn.modules.conv._ConvNd) for m in source.model.diffusion_model.modules())


def dense_weight(source: ModelPatcher, layer: Layer, device: torch.device) -> torch.Tensor:
    """The float32 weight of a layer on `device`, columns scaled as its inputs are, a merge carried out, no LoRAs."""
    weight = base_tensor(source, layer.weight).detach().to(device)
    if is_packed(weight):
        weight = unwrap(weight).dequantize()
    elif isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    patches = source.patches.get(layer.key, ())
    weight = weight.to(torch.float32)
    if merges_models(patches):
        weight = comfy.lora.calculate_weight(patches, weight.clone(), layer.key, intermediate_dtype=torch.float32)
    scale = column_scale(layer.module)
    return weight if scale is None else weight * scale.detach().to(weight).flatten()


def stored_bytes(source: ModelPatcher, layer: Layer) -> int:
    """Bytes of a kept layer's weight."""
    weight = base_tensor(source, layer.weight)
    return unwrap(weight).nbytes if is_packed(weight) else weight.nbytes
