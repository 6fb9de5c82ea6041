"""What the ComfyUI in this process has of what contract/ names, and what becomes of the plugin if it lacks some.

Without an optional name the plugin does without the feature that it costs and says so once in the log; without a
required one it does not start, and says that in a sentence. Whatever depends on the version of ComfyUI is asked here
and nowhere else. This file imports with any ComfyUI, or none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..weights.errors import TravellingError
from .contract import NEEDS, Need

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

OLDEST, NEWEST = "0.16.3", "0.30.0"
"""Versions of ComfyUI between which the plugin is tested."""


@dataclass(frozen=True)
class Gap:
    """Something that is not there: a dotted name, `name(parameter)` or `name: word`, and who needs it."""

    what: str
    need: Need

    def __str__(self) -> str:
        cost = "" if self.need.costs is None else f"; without it: {self.need.costs or 'nothing is lost'}"
        return f"{self.what}, which {self.need.user} needs {self.need.why}{cost}"


class MissingNameError(TravellingError, ImportError):
    """ComfyUI lacks names without which the plugin, or what was asked of it, cannot work. The message has the cure."""

    def __init__(self, gaps: list[Gap]) -> None:
        more = f" (and {len(gaps) - 1} more: {', '.join(gap.what for gap in gaps[1:])})" if gaps[1:] else ""
        gap, here = gaps[0], version()
        super().__init__(
            f"Bonsai: ComfyUI {here} has no {gap.what}, which {gap.need.user} needs {gap.need.why}{more}. {_cure(here)}"
        )
        self.gaps = gaps


def version() -> str:
    """The version of the ComfyUI in this process, such as "0.30.0", or "of an unknown version"."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of an unknown version"


def kitchen_version() -> str:
    """The version of comfy-kitchen, or "none"."""
    try:
        return importlib.metadata.version("comfy-kitchen")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def find(name: str) -> Any:
    """What a dotted name stands for. Raises LookupError if a part of it does not exist."""
    parts = name.split(".")
    found, used = None, 0
    while used < len(parts):
        module = ".".join(parts[: used + 1])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or ""):
                raise  # it exists, and lacks a package itself
            break
        used += 1
        if not hasattr(found, "__path__"):
            break
    if not used:
        raise LookupError(name)
    for part in parts[used:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LookupError(name) from None
    return found


def gaps() -> Iterator[Gap]:
    """What the table names and this ComfyUI lacks: names and parameters, not words."""
    for need in NEEDS:
        for name in need.names:
            try:
                found = find(name)
            except LookupError:
                yield Gap(name, need)
                continue
            for parameter in _not_taken(found, need.takes.split()):
                yield Gap(f"{name}({parameter})", need)


def require() -> None:
    """Asks once, when the plugin starts. Raises MissingNameError; missing optional names are logged."""
    found = [gap for gap in gaps() if not gap.need.user.startswith("tools/")]
    required = [gap for gap in found if gap.need.costs is None]
    if required:
        raise MissingNameError(required)
    for gap in found:
        _tell(gap)


def optional(name: str) -> Any:
    """What a name of an optional row stands for; None if this ComfyUI lacks it, which is logged once."""
    try:
        return find(name)
    except LookupError:
        _tell(Gap(name, _need_of(name)))
        return None


def needed(name: str) -> Any:
    """What a name stands for that one feature needs. Raises MissingNameError if this ComfyUI lacks it."""
    try:
        return find(name)
    except LookupError:
        raise MissingNameError([Gap(name, _need_of(name))]) from None


def taken(function: Callable, **keywords: Any) -> dict[str, Any]:
    """Those of the keyword arguments that a function or class takes; older versions lack the others."""
    absent = _not_taken(function, list(keywords))
    return {name: value for name, value in keywords.items() if name not in absent}


def _need_of(name: str) -> Need:
    return next(need for need in NEEDS if name in (need.name, *need.names))


@functools.cache
def _tell(gap: Gap) -> None:
    if gap.need.costs:
        logger.warning("Bonsai: ComfyUI %s has no %s: %s", version(), gap.what, gap.need.costs)


def _not_taken(function: Any, parameters: list[str]) -> list[str]:
    """Those of the parameters that a function or class cannot be given by name."""
    if not parameters:
        return []
    known = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return []
    return [name for name in parameters if name not in known]


def _cure(here: str) -> str:
    numbers = here.split(".")
    if all(n.isdecimal() for n in numbers) and [int(n) for n in numbers] < [int(n) for n in OLDEST.split(".")]:
        return f"Update ComfyUI to {OLDEST} or newer."
    return f"Update this plugin, or use a ComfyUI between {OLDEST} and {NEWEST}, with which it was tested."


@functools.cache
def scales_columns() -> bool:
    """True if quantized linear layers of this ComfyUI multiply their inputs by a `pre_quant_scale`."""
    algorithms = optional("comfy.quant_ops.QUANT_ALGOS") or {}
    return any("pre_quant_scale" in algorithm["parameters"] for algorithm in algorithms.values())


def share_a_clone_base(a: ModelPatcher, b: ModelPatcher) -> bool:
    """True if newer ComfyUI versions know both as clones of one model, as on several devices."""
    known = getattr(a, "clone_base_uuid", None)
    return known is not None and known == getattr(b, "clone_base_uuid", None)


def share_clone_base(patcher: ModelPatcher, base: ModelPatcher) -> None:
    """Gives `patcher` the id by which newer ComfyUI versions know clones of one model: that of `base`."""
    if hasattr(base, "clone_base_uuid"):
        patcher.clone_base_uuid = base.clone_base_uuid
