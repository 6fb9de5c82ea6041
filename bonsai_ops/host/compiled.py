"""torch.compile on a MODEL, as TorchCompileModel and packs that call ComfyUI's function for it put it there.

ComfyUI compiles modules of the model that it sees and puts them in place while the model is called, by a wrapper of
BaseModel's apply_model. On a clone around another model that wrapper still holds the modules of the first one.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from comfy.patcher_extension import WrappersMP

from . import comfyui

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

COMPILE = comfyui.optional("comfy_api.torch_helpers.torch_compile.set_torch_compile_wrapper")
KEY = comfyui.optional("comfy_api.torch_helpers.torch_compile.COMPILE_KEY")
ARGUMENTS = comfyui.optional("comfy_api.torch_helpers.torch_compile.TORCH_COMPILE_KWARGS")


def compiled_names(wrapper: Callable) -> list[str]:
    """The modules of BaseModel that a wrapper of ComfyUI's replaces by compiled ones; [] for any other wrapper."""
    if not inspect.isfunction(wrapper):
        return []
    return list(inspect.getclosurevars(wrapper).nonlocals.get("compiled_module_dict", ()))


def is_known(patcher: ModelPatcher, event: str, key: str | None, wrapper: Callable) -> bool:
    """True for a compile wrapper that `compile_again` can make anew; event, key: where it stands on the patcher."""
    known = (event, key) == (WrappersMP.APPLY_MODEL, KEY) and ARGUMENTS in patcher.model_options
    return known and bool(compiled_names(wrapper))


def compile_again(patcher: ModelPatcher) -> None:
    """Compiles the patcher's own modules in place of those that its compile wrapper holds, with the same arguments."""
    wrappers = patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    names = [name for w in wrappers if is_known(patcher, WrappersMP.APPLY_MODEL, KEY, w) for name in compiled_names(w)]
    if names:
        COMPILE(model=patcher, keys=names, **patcher.model_options[ARGUMENTS])


@contextlib.contextmanager
def uncompiled(patcher: ModelPatcher) -> Iterator[ModelPatcher]:
    """A clone of the patcher that calls its modules one by one inside, so that hooks on them are called too."""
    clone = patcher.clone()
    if KEY is not None:
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    # whatever else is compiled: newer versions of torch can be told not to use it
    told = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    with torch.compiler.set_stance("force_eager") if told else contextlib.nullcontext():
        yield clone
