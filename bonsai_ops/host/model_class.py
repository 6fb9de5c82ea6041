"""ComfyUI's own model classes around packed weights, for any architecture: like another model or as a file says.

A configuration is ComfyUI's description of a model, from which it makes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from ..kernels import is_the_devices
from . import comfyui
from .linear import make_bonsai_ops

if TYPE_CHECKING:
    from comfy.model_base import BaseModel, ModelType
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import BASE

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPE, _TUPLE = "torch.", "tuple"


def configuration_for_twin(model: BaseModel) -> BASE:
    """A configuration for a packed twin of a ComfyUI BaseModel: the same but for the operations it is made of."""
    source = model.model_config
    # copy.copy does not work: the class answers every attribute it lacks, __setstate__ too, with None
    config = object.__new__(type(source))
    config.__dict__.update(source.__dict__)
    config.unet_config = dict(source.unet_config)
    config.sampling_settings = dict(source.sampling_settings)
    config.optimizations = {"fp8": False}
    config.quant_config = None
    config.set_inference_dtype(source.unet_config.get("dtype"), model.manual_cast_dtype)
    computed = model.get_dtype_inference()
    if computed not in FLOATS:
        fitting = torch.float32 if computed == torch.float64 else torch.bfloat16
        config.set_inference_dtype(source.unet_config.get("dtype"), fitting)
    return config


def empty_model(config: BASE, model_type: ModelType | None, names: Mapping[str, torch.Tensor | None]) -> BaseModel:
    """An empty BaseModel of this configuration with packed linear layers. names: keys of its weights, for ComfyUI.

    Raises ValueError for a model class that cannot be made with other operations than its own.
    """
    config.custom_operations = make_bonsai_ops()
    try:
        model = config.get_model(dict(names), "")
        if model_type is not None and model.model_type != model_type:
            model.model_type = model_type
            model.model_sampling = comfy.model_base.model_sampling(config, model_type)
    except Exception as error:  # whatever a class makes of a configuration that is not its own
        if is_the_devices(error):
            raise
        raise ValueError(
            f"ComfyUI's class for {type(config).__name__} cannot be built with packed layers: {error}"
        ) from error
    return model


def describe_configuration(model: BaseModel) -> dict[str, Any]:
    """What `described_configuration` needs to make the same one again: plain JSON values. Empty if one is not plain."""
    config = model.model_config
    try:
        return {
            "class": type(config).__name__,
            "model_type": model.model_type.name,
            "unet_config": {k: _plain(v) for k, v in config.unet_config.items() if k != "dtype"},
            "sampling_settings": {k: _plain(v) for k, v in config.sampling_settings.items()},
        }
    except TypeError:
        return {}


def described_configuration(described: Mapping[str, Any]) -> tuple[BASE, ModelType] | None:
    """(configuration, model type) of what `describe_configuration` gave; None if ComfyUI has no such class or type."""
    classes = {c.__name__: c for c in comfy.supported_models.models}
    types = comfy.model_base.ModelType.__members__
    if described.get("class") not in classes or described.get("model_type") not in types:
        return None
    try:
        config = classes[described["class"]]({k: _typed(v) for k, v in described["unet_config"].items()})
        config.sampling_settings.update({k: _typed(v) for k, v in described["sampling_settings"].items()})
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    return config, types[described["model_type"]]


def filled(
    model: BaseModel,
    weights: Mapping[str, torch.Tensor],
    load_device: torch.device,
    offload_device: torch.device,
    dynamic: bool,
    shared: bool = False,
) -> ModelPatcher:
    """A ModelPatcher around an empty BaseModel, with these weights in its transformer, on the offload device.

    shared: dense weights, too, become its parameters as they are, copied nowhere; under dynamic VRAM they do always.
    Raises ValueError if one is missing, has no place or another shape.
    """
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    core = comfyui.optional("comfy.model_patcher.CoreModelPatcher") if dynamic else None
    patcher = (core or comfy.model_patcher.ModelPatcher)(model, load_device, offload_device)
    weights, transformer = dict(weights), model.diffusion_model
    if not all(_has_place(transformer, name) for name in weights):
        weights = model.model_config.process_unet_state_dict(weights)
    try:
        missing, unexpected = transformer.load_state_dict(weights, strict=False, assign=shared or is_dynamic(patcher))
    except RuntimeError as error:  # of another shape
        if is_the_devices(error):
            raise
        raise ValueError(str(error).splitlines()[-1].strip()) from error
    if missing or unexpected:
        state, name = ("missing", missing[0]) if missing else ("of no use to it", unexpected[0])
        raise ValueError(f"{name} is {state} in ComfyUI's {type(model).__name__}")
    return patcher


def is_dynamic(patcher: ModelPatcher) -> bool:
    """True if ComfyUI's dynamic VRAM manages this ModelPatcher."""
    known = comfyui.optional("comfy.model_patcher.ModelPatcher.is_dynamic")
    return known is not None and bool(patcher.is_dynamic())


def _has_place(transformer: torch.nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        module = transformer.get_submodule(path)
    except AttributeError:
        return False
    return leaf in module._parameters or leaf in module._buffers


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(v) for v in value]}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict) and _TUPLE not in value:
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is not plain")


def _typed(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_DTYPE):
        dtype = getattr(torch, value.removeprefix(_DTYPE), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value} is no dtype")
        return dtype
    if isinstance(value, list):
        return [_typed(v) for v in value]
    if isinstance(value, dict):
        typed = {k: _typed(v) for k, v in value.items()}
        return tuple(typed[_TUPLE]) if typed.keys() == {_TUPLE} else typed
    return value
