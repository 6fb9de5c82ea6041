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
from ..layout import is_packed, unwrap
from ..linear import PackedLinear
from ..lora import merges_models
from ..tensors import PREFIX, base_tensor, base_tensors, linear_modules
from .options import PatchOptions

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher


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
    """Every linear layer of the source in model order, with the reason for those that stay."""
    ours = dict(twin.diffusion_model.named_modules())
    layers = []
    for name, module in linear_modules(source):
        layer = Layer(name, module)
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
        elif not isinstance(weight, QuantizedTensor) and not weight.is_floating_point():
            layer.kept = f"its weight is {weight.dtype}, not of a float type"
        layers.append(layer)
    return layers


def stays_packed(patcher: ModelPatcher, layer: Layer) -> bool:
    """True if a layer is packed whenever the model is loaded. A merge of models turns it dense."""
    return is_packed(base_tensor(patcher, layer.weight)) and not merges_models(patcher.patches.get(layer.key, ()))


def other_tensors(source: ModelPatcher, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
    """{name: tensor} of the source's transformer that is no weight of `layers`."""
    weights = {layer.weight for layer in layers}
    return {name: tensor for name, tensor in base_tensors(source).items() if name not in weights}


def convolutions(source: ModelPatcher) -> int:
    """The number of its convolutions, which are never packed."""
    return sum(isinstance(m, torch.nn.modules.conv._ConvNd) for m in source.model.diffusion_model.modules())


def dense_weight(source: ModelPatcher, layer: Layer, device: torch.device) -> torch.Tensor:
    """The float32 weight of a layer on `device`, a merge carried out, LoRAs left out."""
    weight = base_tensor(source, layer.weight).detach().to(device)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    patches = source.patches.get(layer.key, ())
    weight = weight.to(torch.float32)
    if merges_models(patches):
        weight = comfy.lora.calculate_weight(patches, weight.clone(), layer.key, intermediate_dtype=torch.float32)
    return weight


def stored_bytes(source: ModelPatcher, layer: Layer) -> int:
    """Bytes of a kept layer's weight."""
    weight = base_tensor(source, layer.weight)
    return unwrap(weight).nbytes if is_packed(weight) else weight.nbytes
