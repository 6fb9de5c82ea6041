"""The tensors of a model's transformer: as its modules hold them, and as they were loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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


def linear_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of every linear layer in model order, whoever made it and however its weight is stored."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            yield name, module


def base_tensor(patcher: ModelPatcher, name: str) -> torch.Tensor:
    """The tensor `name` of the transformer as it was loaded, patches undone."""
    kept = patcher.backup.get(PREFIX + name)
    if kept is not None:
        return kept.weight
    path, _, leaf = name.rpartition(".")
    return getattr(patcher.model.diffusion_model.get_submodule(path), leaf)


def base_tensors(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """{name: tensor} of the transformer as it was loaded, patches undone. Persistent buffers are among them."""
    return {name: base_tensor(patcher, name) for name in tensors_of(patcher.model.diffusion_model)}
