"""The tensors of a model's transformer: as its modules hold them, and as they were loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PREFIX = "diffusion_model."
"""Before the names of the transformer in ComfyUI's keys of a model."""


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: parameter or persistent buffer} as the modules hold them; packed weights stay one tensor each."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        found |= {prefix + n: t for n, t in {**module._parameters, **kept}.items() if t is not None}
    return found


@contextlib.contextmanager
def own_objects(patcher: ModelPatcher) -> Iterator[None]:
    """Inside, the model consists of its own parts, whatever the object patches of a loaded clone have put there."""
    put: dict[str, Any] = {}
    for name, own in patcher.object_patches_backup.items():
        if _attribute(patcher.model, name) is not own:
            put[name] = comfy.utils.set_attr(patcher.model, name, own)
    try:
        yield
    finally:
        for name, patched in reversed(put.items()):
            comfy.utils.set_attr(patcher.model, name, patched)


def _attribute(model: torch.nn.Module, name: str) -> Any:
    """A part of a BaseModel by its dotted name; what ComfyUI keeps in its place if there is none."""
    try:
        return comfy.utils.get_attr(model, name)
    except AttributeError:
        return comfy.utils.ATTR_UNSET


def linear_modules(patcher: ModelPatcher) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of the transformer's linear layers in model order, whoever made them, however they are stored."""
    found = []
    with own_objects(patcher):
        for name, module in patcher.model.diffusion_model.named_modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "in_features") and isinstance(weight, torch.Tensor) and weight.ndim == 2:
                found.append((name, module))
    return found


def base_tensor(patcher: ModelPatcher, name: str) -> torch.Tensor:
    """The tensor `name` of the transformer as it was loaded, patches undone."""
    kept = patcher.backup.get(PREFIX + name)
    if kept is not None:
        return kept.weight
    path, _, leaf = name.rpartition(".")
    with own_objects(patcher):
        return getattr(patcher.model.diffusion_model.get_submodule(path), leaf)


def base_tensors(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """{name: tensor} of the transformer as it was loaded, patches undone. Persistent buffers are among them."""
    with own_objects(patcher):
        return {name: base_tensor(patcher, name) for name in tensors_of(patcher.model.diffusion_model)}
