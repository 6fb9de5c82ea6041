"""The whole work of Patch to BitLinear: choose the layers, quantize them, spend what a target size leaves, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from ...quantize import Statistics
from ..lora import merges_models
from .assemble import assemble, empty_twin
from .layers import Layer, convolutions, linear_layers, other_tensors, quantized, stored_bytes
from .options import PatchOptions
from .report import LayerReport, Report
from .spend import spend

logger = logging.getLogger(__name__)


def patch_model(
    source: object,
    options: PatchOptions,
    statistics: Mapping[str, Statistics] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[object, Report]:
    """(packed ModelPatcher, report); with dry_run, or a target size that has room for all, the first is the source.

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
    twin = empty_twin(base)
    layers = linear_layers(source, twin, options)
    chosen = [layer for layer in layers if layer.kept is None]
    if not chosen:
        reasons = sorted({layer.kept for layer in layers}) or ["the model has no linear layer"]
        raise ValueError(f"nothing is left to pack: {'; '.join(reasons)}")
    for layer in chosen:
        _check_statistics(layer, statistics.get(layer.name))
    device = source.load_device
    rounds = 1 if options.target_bytes is None else 1 + len(options.finer)
    total = rounds * sum(layer.shape[0] * layer.shape[1] for layer in chosen)
    done = 0

    def begin(layer: Layer) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += layer.shape[0] * layer.shape[1]

    for layer in chosen:
        begin(layer)
        layer.made = quantized(source, layer, settings, statistics.get(layer.name), device)
        layer.form = settings.scheme
    other = other_tensors(source, layers)
    notes: list[str] = []
    if options.target_bytes is not None:
        notes.append(spend(source, layers, other, options, statistics, device, begin))
    if progress is not None:
        progress(total, total)
    title = f"{type(base).__name__}, {settings.scheme}, groups of {settings.group_size}" + (
        f", rank {settings.rank}" if settings.rank else ""
    )
    packed = {f"{layer.name}.weight": layer.made.weight for layer in layers if layer.made is not None}
    if options.dry_run:
        notes.append("dry run: the model goes through unchanged")
    elif not packed:
        notes.append("the whole model has room within the target size: it goes through unchanged")
    if statistics:
        notes.append(f"calibrated: {sum(layer.name in statistics for layer in chosen)} of {len(chosen)} layers")
    report = Report(
        title,
        [_layer_report(source, layer) for layer in layers],
        sum(t.nbytes for t in other.values()),
        convolutions(source),
        time.perf_counter() - started,
        notes,
    )
    if options.dry_run or not packed:
        return source, report
    patcher = assemble(source, twin, packed)
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


def _check_statistics(layer: Layer, known: Statistics | None) -> None:
    if known is not None and known.power.shape != (layer.shape[1],):
        raise ValueError(
            f"the calibration has {known.power.shape[0]} inputs for {layer.name}, the model {layer.shape[1]}: it was "
            "recorded with another model"
        )


def _layer_report(source: object, layer: Layer) -> LayerReport:
    if layer.made is None:
        return LayerReport(layer.name, "kept", layer.shape, stored_bytes(source, layer), reason=layer.kept or "")
    weight = layer.made.weight
    return LayerReport(layer.name, layer.form, layer.shape, weight.nbytes, layer.made.error, rank=weight.rank)
