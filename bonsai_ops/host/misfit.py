"""Why a sampling failed that was given what belongs to another model: one sentence that names the node to change.

Nothing is refused beforehand, so whatever ComfyUI accepts is accepted. After a failure what was connected is compared
with what the model takes: by its latent format, by its configuration and by the layer that refused.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import comfy.controlnet
import comfy.patcher_extension
import torch

from ..kernels import is_the_devices
from ..weights.errors import TravellingError

if TYPE_CHECKING:
    from comfy.latent_formats import LatentFormat
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import WrapperExecutor
    from comfy.samplers import CFGGuider

KEY = "bonsai_misfit"
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)
"""What ComfyUI's models raise for inputs of another model."""
TEXT_WIDTHS = (
    "context_in_dim",
    "joint_attention_dim",
    "text_dim",
    "cap_feat_dim",
    "caption_channels",
    "crossattn_emb_channels",
    "context_dim",
)
"""Names under which configurations have the width of the text states, which no other width of theirs is called."""
ABOUT_SIZES = "(?i)shape|size|dimension|columns"
"""Words of torch, and of our products, for inputs that do not fit one another, also where a compiler reports them."""
LATENTS = {
    "reference_latents": "VAE Encode in front of Reference Latent",
    "concat_latent_image": "the VAE of the inpainting or image conditioning node",
}
"""{key of a conditioning: the node that makes the latents there}."""
OWN_ENCODER = "Load Bonsai Pack, Load Bonsai Text Encoder, or CLIPLoader with qwen_3_4b.safetensors and type flux2"
KLEIN_TEXT = 7680
"""Width of what FLUX.2 Klein 4B reads: three hidden states of Qwen3-4B."""
OWN_VAE = "Load Bonsai Pack, or VAELoader with flux2-vae.safetensors"


class MisfitError(TravellingError, ValueError):
    """A conditioning or latent belongs to another model. The message says what was found and which node to change."""

    __module__ = "bonsai"  # as for PackError


@dataclass(frozen=True)
class _Refusal:
    """The innermost layer that an error passed: the width it takes, the shapes that it was given."""

    layer: torch.nn.Module
    takes: int
    given: tuple[tuple[int, ...], ...]

    @property
    def was_given_its_width(self) -> bool:
        return any(shape[-1] == self.takes for shape in self.given)

    def was_given(self, width: int) -> bool:
        """True if something of another width than it takes came in, and this is that width."""
        return width != self.takes and any(shape[-1] == width for shape in self.given)


def explain_misfits(patcher: ModelPatcher) -> None:
    """Has every sampling of a ModelPatcher, and of its clones, explained when it fails."""
    outer = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    if not patcher.get_wrappers(outer, KEY):
        patcher.add_wrapper_with_key(outer, KEY, _explained)


def _explained(
    executor: WrapperExecutor, noise: torch.Tensor, latent: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    guider: CFGGuider = executor.class_obj
    with explained(guider.model_patcher.model, guider.conds, latent):
        return executor(noise, latent, *args, **kwargs)


@contextlib.contextmanager
def explained(model: BaseModel, conds: Mapping[str, list[dict]], latent: torch.Tensor) -> Iterator[None]:
    """Inside, a sampling that fails because of its inputs raises MisfitError.

    conds: {"positive": dicts as ComfyUI samples them, their text states under "cross_attn"}. latent: what is sampled.
    """
    try:
        yield
    except MisfitError:
        raise
    except FAILURES as error:
        if is_the_devices(error):
            raise
        reason = _reason(error, model, conds, latent)
        if reason is None:
            raise
        raise MisfitError(reason) from error


def as_conds(conditioning: list) -> list[dict]:
    """A CONDITIONING as ComfyUI samples it."""
    return [{**options, "cross_attn": states} for states, options in conditioning]


def _reason(
    error: BaseException, model: BaseModel, conds: Mapping[str, list[dict]], latent: torch.Tensor
) -> str | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    refusal = _refusal(frames, model.diffusion_model)
    if refusal is not None and refusal.was_given_its_width and not re.search(ABOUT_SIZES, str(error)):
        refusal = None  # something else went wrong in that layer
    each = [(name, cond) for name, entries in conds.items() for cond in entries]
    checks: list[Callable[[], str | None]] = [lambda: _latent(model, latent)]
    checks += [lambda n=n, c=c: _text(model, n, c, refusal, error) for n, c in each]
    checks += [lambda n=n, c=c: _references(model, n, c) for n, c in each]
    checks += [lambda n=n, c=c: _pooled(model, n, c, refusal, frames) for n, c in each]
    checks += [lambda n=n, c=c: _control(model, n, c, frames) for n, c in each]
    checks.append(lambda: _added(model, frames))
    return next((found for check in checks if (found := check()) is not None), None)


def _latent(model: BaseModel, latent: torch.Tensor) -> str | None:
    kind: LatentFormat = model.latent_format
    if not _is_foreign(kind, latent):
        return None
    return (
        f"the latent has shape {list(latent.shape)}, {_name(model)} takes {_expected(kind)}: it is of another model's "
        f"VAE. Change the node that makes it: encode the picture with this model's own VAE{_own(model, OWN_VAE)}, or "
        f"use {'Empty Flux 2 Latent' if _is_klein(model) else 'an empty latent made for this model'}."
    )


def _references(model: BaseModel, name: str, cond: dict) -> str | None:
    kind: LatentFormat = model.latent_format
    for key, node in LATENTS.items():
        value = cond.get(key)
        for latent in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(latent, torch.Tensor) and _is_foreign(kind, latent):
                return (
                    f"the {name} conditioning has {key} of shape {list(latent.shape)}, {_name(model)} takes "
                    f"{_expected(kind)}: they are of another model's VAE. Change {node}: give it this model's own "
                    f"VAE{_own(model, OWN_VAE)}."
                )
    return None


def _text(model: BaseModel, name: str, cond: dict, refusal: _Refusal | None, error: BaseException) -> str | None:
    states = cond.get("cross_attn")
    if states is None:
        return f"the {name} conditioning holds no text states. Connect CLIP Text Encode."
    if not isinstance(states, torch.Tensor) or states.ndim != 3:
        shape = list(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
        return (
            f"the {name} conditioning is {shape}, expected text states [batch, tokens, width]. "
            "Change the node that makes it, such as CLIP Text Encode."
        )
    width = states.shape[-1]
    if refusal is not None:
        takes = refusal.takes if refusal.was_given(width) else width
    else:
        takes = (re.search(ABOUT_SIZES, str(error)) and _text_width(model)) or width
    if width == takes:
        return None
    return (
        f"the {name} conditioning is {width} wide, {_name(model)} takes {takes}: it comes from another model's text "
        f"encoder. Change the node that loads the CLIP of CLIP Text Encode{_own_encoder(model, takes)}."
    )


def _pooled(model: BaseModel, name: str, cond: dict, refusal: _Refusal | None, frames: list[FrameType]) -> str | None:
    pooled = cond.get("pooled_output")
    cure = "Change the node that loads the CLIP of CLIP Text Encode to the text encoder of this model."
    if not isinstance(pooled, torch.Tensor):
        if not any(frame.f_code.co_name == "encode_adm" for frame in frames):
            return None
        return f"the {name} conditioning has no pooled_output, which {_name(model)} reads. {cure}"
    width = pooled.shape[-1]
    for shape in () if refusal is None else refusal.given:
        # the model may have put other numbers of its own behind it
        takes = refusal.takes - (shape[-1] - width)
        if len(shape) == 2 and shape[-1] >= width and 0 < takes != width:
            return f"the pooled_output of the {name} conditioning is {width} wide, {_name(model)} takes {takes}. {cure}"
    return None


def _control(model: BaseModel, name: str, cond: dict, frames: list[FrameType]) -> str | None:
    if cond.get("control") is None:
        return None
    asked = any(isinstance(frame.f_locals.get("self"), comfy.controlnet.ControlBase) for frame in frames)
    added = isinstance(frames[-1].f_locals.get("control"), dict)
    if not asked and not added:
        return None
    what = type(cond["control"]).__name__
    channels = model.latent_format.latent_channels
    stopped = _refusal(frames, None)
    found = "" if stopped is None else f" (a layer of it takes {stopped.takes})"
    return (
        f"the {what} in the {name} conditioning{found} does not fit {_name(model)} and its {channels} latent "
        "channels: it is of another model family. Change the ControlNet of Apply ControlNet, or take that node out."
    )


def _added(model: BaseModel, frames: list[FrameType]) -> str | None:
    """What a node has put beside the layers of the model, such as a model patch for another family."""
    own = {id(module) for module in model.modules()}
    refusal = _refusal(frames, None)
    if refusal is None or id(refusal.layer) in own or refusal.was_given_its_width:
        return None
    called = [frame.f_locals.get("self") for frame in frames]
    added = [module for module in called if isinstance(module, torch.nn.Module) and id(module) not in own]
    return (
        f"a {type(added[0]).__name__} that another node added to {_name(model)} does not fit it: a layer takes "
        f"{refusal.takes}, it was given {' and '.join(str(list(s)) for s in refusal.given)}. Take that node out, or "
        "give it what was made for this model."
    )


def _refusal(frames: list[FrameType], transformer: torch.nn.Module | None) -> _Refusal | None:
    """The innermost layer with a weight that an error passed; of the transformer, or of any model if that is None."""
    known = None if transformer is None else {id(module) for module in transformer.modules()}
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        weight = getattr(module, "weight", None) if isinstance(module, torch.nn.Module) else None
        if not isinstance(weight, torch.Tensor) or not weight.ndim or (known is not None and id(module) not in known):
            continue
        given = [value for name, value in frame.f_locals.items() if name not in ("weight", "bias")]
        given += [value for values in given if isinstance(values, tuple) for value in values]
        shapes = tuple(tuple(v.shape) for v in given if isinstance(v, torch.Tensor) and v.ndim)
        return _Refusal(module, weight.shape[1] if weight.ndim > 1 else weight.shape[0], shapes)
    return None


def _is_foreign(kind: LatentFormat, latent: torch.Tensor) -> bool:
    """Whether a latent has channels or dimensions of another format. Several in one, packed as [B, 1, N], never do."""
    if latent.ndim == 3 and latent.shape[1] == 1:
        return False
    flat = latent.ndim == 4 and kind.latent_dimensions == 3  # ComfyUI makes one frame of it
    return latent.shape[1] != kind.latent_channels or not (flat or latent.ndim == 2 + kind.latent_dimensions)


def _expected(kind: LatentFormat) -> str:
    sides = {1: "length", 2: "height, width", 3: "frames, height, width"}.get(kind.latent_dimensions, "..")
    return f"[batch, {kind.latent_channels}, {sides}]"


def _text_width(model: BaseModel) -> int | None:
    """The width of the text states as the configuration of the model has it, None if it does not say."""
    config = model.model_config.unet_config
    width = next((config[key] for key in TEXT_WIDTHS if config.get(key)), None)
    return width if isinstance(width, int) else None


def _name(model: BaseModel) -> str:
    return type(model).__name__


def _is_klein(model: BaseModel) -> bool:
    return _name(model) == "Flux2"


def _own(model: BaseModel, node: str) -> str:
    return f" ({node})" if _is_klein(model) else ""


def _own_encoder(model: BaseModel, width: int) -> str:
    return f": {OWN_ENCODER}" if _is_klein(model) and width == KLEIN_TEXT else " to the text encoder of this model"
