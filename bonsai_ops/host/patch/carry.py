"""What was set on the source of a patch: what goes along, what is made anew, and what is refused.

ComfyUI's clone takes over all of it. Most works with whatever model it meets; what holds parts of the source would let
these draw in place of the packed ones.

| on the source                          | on the packed model                                              |
| -------------------------------------- | ---------------------------------------------------------------- |
| LoRAs, weight wrappers, options, hooks | the same                                                         |
| a compile wrapper of ComfyUI           | compiled anew with the same arguments                            |
| bypass LoRAs                           | LoRAs of the same strength                                       |
| functions that hold the whole model    | the same functions, with the packed model                        |
| object patches of the sampling, values | the same                                                         |
| object patches of the transformer      | refused: a packed layer under one would not be called            |
| whatever else holds parts of it        | refused: wrapper, callback, injection, option, attachment, model |
| hooks and methods set on its modules   | refused: the packed model has modules of its own                 |
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection

from .. import comfyui, compiled
from ..tensors import PREFIX

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.weight_adapter import BypassForwardHook

BYPASS = comfyui.optional("comfy.weight_adapter.BypassInjectionManager") or ()
"""A class for isinstance, () where this ComfyUI has none."""
SAME_IN_BYPASS = {"lora": 4, "loha": 7, "lokr": 8}
"""{kind of adapter that does the same in bypass and as a patch: where its weights have the scale of a DoRA}"""
DEPTH = 12
"""How many references away a part of the source is looked for: six for a module in the closure of a method's object."""
LEAVES = (type, types.ModuleType, types.CodeType, types.FrameType, types.GeneratorType, torch.Tensor, ModelPatcher)


def require_carried(source: ModelPatcher, twin: BaseModel) -> None:
    """Raises ValueError, one sentence with the cure, for what cannot go along from the source to the packed twin."""
    for name, thing in source.object_patches.items():
        if f"{name}.".startswith(PREFIX) and (callable(thing) or isinstance(thing, torch.Tensor)):
            raise _refused(f"the object patch {name} replaces a part of the model that is to be packed")
    for key, models in source.additional_models.items():
        if any(model.model is source.model or comfyui.share_a_clone_base(model, source) for model in models):
            raise _refused(f"the additional model {key} is this model on another device")
    parts = _parts(source)
    for what, thing in _set_on(source):
        if _holds(thing, source, parts):
            raise _refused(f"{what} of this model holds parts of it, and would let them draw in place of packed ones")
    with _ejected(source):
        for what in _set_on_modules(source, twin):
            raise _refused(f"{what} was set on this model from outside, and a packed model has modules of its own")
    for _ in _bypass_loras(source):
        pass  # raises for one that is no LoRA of the model


def carry_over(source: ModelPatcher, patcher: ModelPatcher) -> None:
    """Makes anew on a clone around another model what points to the model and modules of `source` on it."""
    compiled.compile_again(patcher)
    for held in ("object_patches", "wrappers", "callbacks", "model_options", "weight_wrapper_patches"):
        setattr(patcher, held, _moved(getattr(patcher, held), source, patcher, set()))
    for key, hook in _bypass_loras(source):
        patcher.add_patches({key: hook.adapter}, hook.multiplier)
    for key, injections in source.injections.items():
        others = [injection for injection in injections if _manager(injection) is None]
        if others:
            patcher.set_injections(key, [_injection(injection, source, patcher) for injection in others])
        else:
            patcher.remove_injections(key)


def _injection(injection: PatcherInjection, source: ModelPatcher, patcher: ModelPatcher) -> PatcherInjection:
    old = (injection.inject, injection.eject)
    new = tuple(_moved(function, source, patcher, set()) for function in old)
    return injection if new == old else PatcherInjection(*new)


def _moved(thing: Any, source: ModelPatcher, patcher: ModelPatcher, under_way: set[int]) -> Any:
    """A thing with the packed model where functions and containers of it hold the source; itself if none does."""
    if thing is source.model or (isinstance(thing, ModelPatcher) and thing.model is source.model):
        return patcher.model if thing is source.model else patcher
    if id(thing) in under_way:
        return thing
    under_way.add(id(thing))

    def each(things: Iterable[Any]) -> list[Any]:
        return [_moved(item, source, patcher, under_way) for item in things]

    made = thing
    if type(thing) is dict:
        values = each(thing.values())
        made = thing if _same(values, thing.values()) else dict(zip(thing, values, strict=True))
    elif type(thing) in (list, tuple):
        values = each(thing)
        made = thing if _same(values, thing) else type(thing)(values)
    elif isinstance(thing, types.MethodType):
        values = each([thing.__self__])
        made = thing if _same(values, [thing.__self__]) else types.MethodType(thing.__func__, *values)
    elif isinstance(thing, types.FunctionType) and thing.__closure__:
        cells = tuple(_cell(cell, *each(_contents(cell))) for cell in thing.__closure__)
        if not _same(cells, thing.__closure__):
            made = types.FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, cells)
            made.__kwdefaults__ = thing.__kwdefaults__
            made.__dict__.update(thing.__dict__)
    under_way.discard(id(thing))
    return made


def _same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _contents(cell: types.CellType) -> list[Any]:
    """What a variable of a function holds, [] if it was never set."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _cell(cell: types.CellType, *contents: Any) -> types.CellType:
    """The cell, which functions may share, or another one where its contents differ."""
    same = not contents or contents[0] is cell.cell_contents
    return cell if same else types.CellType(*contents)


def _refused(what: str) -> ValueError:
    return ValueError(f'{what}: connect the node that adds it behind "Patch to BitLinear" instead of before it')


def _set_on(source: ModelPatcher) -> Iterator[tuple[str, Any]]:
    """(what it is, the thing) of all that a clone takes over and that may hold anything."""
    for name, thing in source.object_patches.items():
        yield f"the object patch {name}", thing
    for kind, added in (("wrapper", source.wrappers), ("callback", source.callbacks)):
        for event, by_key in added.items():
            for key, things in by_key.items():
                for thing in things:
                    if not (kind == "wrapper" and compiled.is_known(source, event, key, thing)):
                        yield f"the {kind} {key or event}", thing
    for key, injections in source.injections.items():
        for injection in injections:
            if _manager(injection) is None:
                yield f"the injection {key}", injection
    for key, functions in source.weight_wrapper_patches.items():
        yield f"the weight wrapper of {key}", functions
    options = dict(source.model_options)
    for key, thing in (*options.pop("transformer_options", {}).items(), *options.items()):
        if key != compiled.ARGUMENTS:
            yield f"the option {key}", thing
    for key, thing in source.attachments.items():
        yield f"the attachment {key}", thing


def _parts(source: ModelPatcher) -> set[int]:
    """Identities of the transformer, its modules and its parameters."""
    transformer = source.model.diffusion_model
    return {id(part) for part in (*transformer.modules(), *transformer.parameters())}


def _holds(thing: Any, source: ModelPatcher, parts: set[int]) -> bool:
    """True if a part of the source's transformer is found by following references from `thing`.

    Not through the whole model: nodes keep it to look up what the packed one has as well.
    """
    seen = {id(source.model)}
    level = [thing]
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            if id(item) in parts:
                return True
            if id(item) not in seen:
                seen.add(id(item))
                below += _held_by(item)
        level = below
    return False


def _held_by(thing: Any) -> list[Any]:
    if isinstance(thing, types.FunctionType):  # not its globals, which hold the whole program
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    if isinstance(thing, weakref.ref):
        return [thing()]
    return [] if isinstance(thing, LEAVES) else gc.get_referents(thing)


@contextlib.contextmanager
def _ejected(source: ModelPatcher) -> Iterator[None]:
    """Inside, no clone of the source that is loaded has its injections in the modules."""
    with contextlib.ExitStack() as stack:
        for patcher in (source, *comfy.model_management.loaded_models()):
            if patcher.model is source.model:
                stack.enter_context(patcher.use_ejected())
        yield


def _set_on_modules(source: ModelPatcher, twin: BaseModel) -> Iterator[str]:
    """Modules, forward hooks and methods of modules of the source that a new model of its class does not have.

    To be asked while nothing is injected.
    """
    fresh = dict(twin.diffusion_model.named_modules())
    for name, module in source.model.diffusion_model.named_modules():
        if name not in fresh:
            yield f"the module {name}"
        own = vars(fresh[name]) if name in fresh else {}
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            if len(vars(module)[kind]) > len(own.get(kind, ())):
                yield f"a forward hook of {name or 'the transformer'}"
        for attribute, thing in vars(module).items():
            method = getattr(type(module), attribute, None)
            if callable(thing) and callable(method) and attribute not in own and not _is_its_own(thing, module, method):
                yield f"the method {f'{name}.{attribute}'.lstrip('.')}"


def _is_its_own(thing: Any, module: torch.nn.Module, method: Any) -> bool:
    """True for a bound method that was only put back, as injections do when they end."""
    return getattr(thing, "__self__", None) is module and getattr(thing, "__func__", None) is method


def _manager(injection: PatcherInjection) -> Any:
    """The manager of ComfyUI's that an injection of bypass LoRAs belongs to, None for any other injection."""
    if not inspect.isfunction(injection.inject):
        return None
    held = inspect.getclosurevars(injection.inject).nonlocals.values()
    return next((thing for thing in held if isinstance(thing, BYPASS)), None)


def _bypass_loras(source: ModelPatcher) -> Iterator[tuple[str, BypassForwardHook]]:
    """(key of the weight, hook) of every bypass LoRA. Raises ValueError for one that does something else as a patch."""
    names = {id(module): name for name, module in source.model.named_modules()}
    managers = (_manager(injection) for injections in source.injections.values() for injection in injections)
    for hook in (hook for manager in managers if manager is not None for hook in manager.hooks):
        kind = getattr(hook.adapter, "name", type(hook.adapter).__name__)
        scale = SAME_IN_BYPASS.get(kind)
        if scale is None or hook.adapter.weights[scale] is not None or id(hook.module) not in names:
            raise ValueError(
                f"a bypass LoRA of this model ({kind}{'' if scale is None else ' with a scale of its own'}) does "
                "something else in bypass than in the weights: load it with Load LoRA instead of the bypass version"
            )
        yield f"{names[id(hook.module)]}.weight", hook
