"""Any diffusion MODEL of ComfyUI -> the same with few-bit linear layers: what "Patch to BitLinear" does.

The result is a second model of the source's own class, made with our operations (linear.py), so that LoRAs, offload,
clones and saving work as with a loaded pack. The source is only read. What was set on it (LoRAs, model sampling,
wrappers, options) goes along; a merge of models is carried out first, as its result is what is to be packed.
"""

from __future__ import annotations

import fnmatch
import logging
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import comfy.lora
import comfy.model_management
import torch
from comfy_kitchen.tensor import QuantizedTensor

from . import build, dispatch
from .layout import is_packed, unwrap, wrap
from .linear import PackedLinear
from .loader import ATTACHMENT, LoadReport
from .lora import adopt, merges_models
from .packed_weight import PackedWeight
from .quantize import LayerError, Settings, Statistics, budget, fitting_group, quantize_layer
from .quantize.layer import GROUP_SIZES, Quantized
from .quantize.report import LayerReport, Report

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."
EXCLUDED = (
    # embedders of picture, text, time and guidance
    "img_in*",
    "txt_in*",
    "time_in*",
    "vector_in*",
    "guidance_in*",
    "*_embedder*",
    "*embedding*",
    "time_embed*",
    "time_text_embed*",
    "label_emb*",
    "time_projection*",
    "img_emb*",
    "patch_embed*",
    "patchify_proj*",
    "caption_projection*",
    "pos_embed*",
    "distilled_guidance_layer*",
    # modulation
    "*modulation*",
    "*img_mod*",
    "*txt_mod*",
    "*adaLN*",
    "*adaln*",
    "*emb_layers*",
    # the end
    "final_layer*",
    "norm_out*",
    "proj_out",
    "head.*",
    "out.*",
)
"""Layers that stay as they are unless the user says otherwise, as in PrismML's models."""
KEPT = "kept"


@dataclass(frozen=True)
class PatchOptions:
    """What to pack and how. include, exclude: patterns of fnmatch on layer names, such as "double_blocks.*.qkv".

    target_bytes: size the whole model may have; layers then get 4 bits or
    stay as they are where that helps most. None: all few-bit.
    """

    scheme: str = "ternary"
    group_size: int = 128
    rank: int = 0
    target_bytes: int | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = EXCLUDED
    dry_run: bool = False

    @property
    def settings(self) -> Settings:
        return Settings(self.scheme, self.group_size, self.rank)


@dataclass
class _Layer:
    """One linear layer of the source. kept: why it stays, None for one to be packed."""

    name: str
    module: torch.nn.Module
    kept: str | None = None
    made: Quantized | None = None
    form: str = ""
    options: list[budget.Option] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{PREFIX}{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.weight.shape)


_patched: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
"""{name: patched ModelPatcher} while one is alive, so that ComfyUI can ask for it again by plain arguments."""


def patterns(text: str) -> tuple[str, ...]:
    """The patterns in a text that has commas, spaces or line ends between them."""
    return tuple(text.replace(",", " ").split())


def patch_model(
    source: object,
    options: PatchOptions,
    statistics: Mapping[str, Statistics] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[object, Report]:
    """(packed ModelPatcher, report); with dry_run the first is the source itself.

    statistics: {layer name: what its inputs were}. progress(weights done, weights in all) is called a layer; what it
    raises ends the work, and the source is as it was. Raises ValueError if nothing can be packed, if the model is made
    of layers that ComfyUI does not build through its operations, or for a weight that is not finite.
    """
    started = time.perf_counter()
    settings = options.settings
    base = source.model
    if not hasattr(base, "diffusion_model") or not hasattr(base, "model_config"):
        raise ValueError("this MODEL is no diffusion model of ComfyUI: it has no transformer or UNet to patch")
    statistics = statistics or {}
    twin = _empty_twin(base)
    layers = _layers(source, twin, options)
    chosen = [layer for layer in layers if layer.kept is None]
    if not chosen:
        reasons = sorted({layer.kept for layer in layers}) or ["the model has no linear layer"]
        raise ValueError(f"nothing is left to pack: {'; '.join(reasons)}")
    for layer in chosen:
        _check_statistics(layer, statistics.get(layer.name))
    device = source.load_device
    total = sum(layer.shape[0] * layer.shape[1] for layer in chosen) * (1 if options.target_bytes is None else 2)
    done = 0
    for layer in chosen:
        if progress is not None:
            progress(done, total)
        layer.made = _quantize(source, layer, settings, statistics.get(layer.name), device)
        layer.form = settings.scheme
        done += layer.shape[0] * layer.shape[1]
    other = {n: t for n, t in _base_tensors(source).items() if n not in {f"{x.name}.weight" for x in layers}}
    notes: list[str] = []
    if options.target_bytes is not None:
        notes.append(_spend(source, layers, other, options, statistics, device, progress, done, total))
    if progress is not None:
        progress(total, total)
    convolutions = sum(isinstance(m, torch.nn.modules.conv._ConvNd) for m in base.diffusion_model.modules())
    title = f"{type(base).__name__}, {settings.scheme}, groups of {settings.group_size}" + (
        f", rank {settings.rank}" if settings.rank else ""
    )
    if options.dry_run:
        notes.append("dry run: the model goes through unchanged")
    if statistics:
        notes.append(f"calibrated: {sum(layer.name in statistics for layer in chosen)} of {len(chosen)} layers")
    report = Report(
        title,
        [_layer_report(source, layer) for layer in layers],
        sum(t.nbytes for t in other.values()),
        convolutions,
        time.perf_counter() - started,
        notes,
    )
    if options.dry_run:
        return source, report
    packed = {f"{layer.name}.weight": layer.made.weight for layer in layers if layer.made is not None}
    patcher = _assemble(source, twin, packed, settings.scheme)
    baked = [layer.key for layer in chosen if merges_models(source.patches.get(layer.key, ()))]
    for key in baked:
        patcher.patches.pop(key, None)
    logger.info(
        "Bonsai: %s: %d layers packed, %.1f MB, relative error %.4f, %.1f s",
        title,
        len(packed),
        report.nbytes / 1e6,
        report.total("relative"),
        report.seconds,
    )
    return patcher, report


def rebuild_patched(name: str, disable_dynamic: bool = False) -> object:
    """The patched model called `name` once more, around the same packed weights: ComfyUI's `cached_patcher_init`.

    Raises RuntimeError if it is not alive in this process: it exists in memory only.
    """
    living = _patched.get(name)
    if living is None:
        raise RuntimeError(
            "this patched model exists only in the memory of the process that patched it. Save it with "
            '"Save Bonsai Model" and load the file with "Load Bonsai Model" to use it elsewhere.'
        )
    twin = _empty_twin(living.model)
    return _around(living, twin, _base_tensors(living), dynamic=not disable_dynamic)


def _empty_twin(base: torch.nn.Module) -> torch.nn.Module:
    names = dict.fromkeys(build.tensors_of(base.diffusion_model))
    return build.build(build.config_of(base), base.model_type, names)


def _layers(source: object, twin: torch.nn.Module, options: PatchOptions) -> list[_Layer]:
    """Every linear layer of the source in model order, with the reason for those that stay."""
    ours = dict(twin.diffusion_model.named_modules())
    layers = []
    for name, module in source.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "in_features") or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        layer = _Layer(name, module)
        excluded = next((p for p in options.exclude if fnmatch.fnmatchcase(name, p)), None)
        columns = weight.shape[1]
        if is_packed(weight):
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


def _base_tensors(source: object) -> dict[str, torch.Tensor]:
    """{name: tensor} of the source's transformer as it was loaded, patches undone."""
    tensors = build.tensors_of(source.model.diffusion_model)
    for name in tensors:
        kept = source.backup.get(PREFIX + name)
        if kept is not None:
            tensors[name] = kept.weight
    return tensors


def _dense(source: object, layer: _Layer, device: torch.device) -> torch.Tensor:
    """The float32 weight of a layer on `device`, a merge carried out, LoRAs left out."""
    kept = source.backup.get(layer.key)
    weight = layer.module.weight if kept is None else kept.weight
    weight = weight.detach().to(device)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    patches = source.patches.get(layer.key, ())
    weight = weight.to(torch.float32)
    if merges_models(patches):
        weight = comfy.lora.calculate_weight(patches, weight.clone(), layer.key, intermediate_dtype=torch.float32)
    return weight


def _quantize(
    source: object, layer: _Layer, settings: Settings, statistics: Statistics | None, device: torch.device
) -> Quantized:
    try:
        made = quantize_layer(_dense(source, layer, device), settings, statistics)
    except torch.OutOfMemoryError:
        comfy.model_management.soft_empty_cache()
        made = quantize_layer(_dense(source, layer, torch.device("cpu")), settings, statistics)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}. Exclude the layer, or load the model's file again.") from error
    return Quantized(made.weight.to(source.offload_device), made.error, made.squared)


def _spend(
    source: object,
    layers: Sequence[_Layer],
    other: Mapping[str, torch.Tensor],
    options: PatchOptions,
    statistics: Mapping[str, Statistics],
    device: torch.device,
    progress: Callable[[int, int], None] | None,
    done: int,
    total: int,
) -> str:
    """Gives layers 4 bits, or keeps them, as far as the target allows, where that takes away most error for a byte."""
    four = Settings("4bit", options.group_size)
    chosen = {layer.name: layer for layer in layers if layer.kept is None}
    for layer in chosen.values():
        if progress is not None:
            progress(done, total)
        finer = _quantize(source, layer, four, statistics.get(layer.name), device)
        layer.options = [
            budget.Option(layer.form, layer.made.weight.nbytes, _sensitivity(layer.made.error)),
            budget.Option(four.scheme, finer.weight.nbytes, _sensitivity(finer.error)),
            budget.Option(KEPT, _stored(source, layer), 0.0),
        ]
        done += layer.shape[0] * layer.shape[1]
    fixed = sum(t.nbytes for t in other.values()) + sum(_stored(source, x) for x in layers if x.kept is not None)
    found = budget.choose({name: layer.options for name, layer in chosen.items()}, options.target_bytes - fixed)
    for name, option in found.items():
        layer = chosen[name]
        if option.name == KEPT:
            layer.made, layer.kept = None, "room for it within the target size"
        elif option.name != layer.form:
            layer.made, layer.form = _quantize(source, layer, four, statistics.get(name), device), option.name
    size = fixed + sum(option.nbytes for option in found.values())
    names = [option.name for option in found.values()]
    counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys((options.scheme, four.scheme, KEPT)))
    reached = "reached" if size <= options.target_bytes else "not reachable, this is the smallest"
    return f"target {options.target_bytes / 1e6:.1f} MB {reached}: {size / 1e6:.1f} MB ({counts})"


def _sensitivity(error: LayerError) -> float:
    """What the budget weighs: the squared relative error of the outputs where inputs are known, else of the weights."""
    return (error.relative if error.output is None else error.output) ** 2


def _check_statistics(layer: _Layer, known: Statistics | None) -> None:
    if known is not None and known.power.shape != (layer.shape[1],):
        raise ValueError(
            f"the calibration has {known.power.shape[0]} inputs for {layer.name}, the model {layer.shape[1]}: it was "
            "recorded with another model"
        )


def _stored(source: object, layer: _Layer) -> int:
    """Bytes of a kept layer's weight."""
    kept = source.backup.get(layer.key)
    weight = layer.module.weight if kept is None else kept.weight
    return unwrap(weight).nbytes if is_packed(weight) else weight.nbytes


def _layer_report(source: object, layer: _Layer) -> LayerReport:
    if layer.made is None:
        return LayerReport(layer.name, "kept", layer.shape, _stored(source, layer), reason=layer.kept or "")
    weight = layer.made.weight
    return LayerReport(layer.name, layer.form, layer.shape, weight.nbytes, layer.made.error, rank=weight.rank)


def _assemble(source: object, twin: torch.nn.Module, packed: Mapping[str, PackedWeight], scheme: str) -> object:
    """The packed ModelPatcher: weights into the twin, everything that was set on the source beside it."""
    tensors: dict[str, object] = {**_base_tensors(source), **packed}
    patcher = _around(source, twin, tensors, dynamic=build.is_dynamic(source))
    name = uuid.uuid4().hex
    _patched[name] = patcher
    patcher.cached_patcher_init = (rebuild_patched, (name,))
    patcher.set_attachments(ATTACHMENT, _load_report(patcher, scheme))
    return patcher


def _around(source: object, twin: torch.nn.Module, tensors: Mapping[str, object], dynamic: bool) -> object:
    """A clone of the patcher `source` around the twin, filled with `tensors`."""
    dtype = twin.get_dtype_inference()
    offload = source.offload_device
    weights = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedWeight):
            tensor = wrap(tensor, dtype)
        elif isinstance(tensor, QuantizedTensor) and not is_packed(tensor):
            tensor = tensor.dequantize()
        weights[name] = tensor.detach().to(offload)
    if not comfy.model_management.is_device_cpu(offload):
        twin.to(offload)
    fresh = build.patcher_of(twin, source.load_device, offload, dynamic)
    build.fill(twin, weights, assign=build.is_dynamic(fresh))
    patcher = source.clone(disable_dynamic=not dynamic, model_override=fresh.get_clone_model_override())
    patcher.size, patcher.parent = 0, None
    if hasattr(patcher, "clone_base_uuid"):
        patcher.clone_base_uuid = fresh.clone_base_uuid
    patcher.cached_hook_patches, patcher.hook_backup, patcher.current_hooks = {}, {}, None
    patcher.is_injected = False
    adopt(patcher)
    return patcher


def _load_report(patcher: object, scheme: str) -> LoadReport:
    base = patcher.model
    tensors = build.tensors_of(base.diffusion_model).values()
    packed = [unwrap(t) for t in tensors if is_packed(t)]
    dtype = base.get_dtype_inference()
    choice = dispatch.resolve(dispatch.call_of(patcher.load_device, dtype, packed[0]))
    schemes = {weight.scheme for weight in packed}
    return LoadReport(
        "",
        f"patched {type(base).__name__}",
        scheme if len(schemes) == 1 else "mixed",
        len(packed),
        sum(w.nbytes for w in packed),
        sum(t.nbytes for t in tensors if not is_packed(t)),
        0.0,
        str(dtype).removeprefix("torch."),
        choice.backend.name,
        choice.declined,
        {"patched": type(base).__name__},
        choice.mode,
        type(base.model_config).__name__,
        build.describe(base),
    )
