"""Training on few cores: compiled modules, the processor's fast number format, a running average of the weights."""

from __future__ import annotations

import contextlib
import os
import shutil

import torch
from torch.nn.utils import parametrize

from bonsai_ops.kernels import cpu_has_fast_bf16


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    """`module` through torch.compile where a C++ compiler is found (2.5 times as fast for the VAE on one core)."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(module, dynamic=False) if compiler else module


def narrow() -> contextlib.AbstractContextManager:
    """Inside, products are in bf16 where the processor has it; elsewhere that would be 200 times as slow as fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_fast_bf16())


def frozen(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with the weights that its parametrizations give, computed once instead of at each call."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
    return module


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, keep: float, step: int) -> None:
    """Moves `average` towards `model`; faster in the first steps."""
    share = 1 - min(keep, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
