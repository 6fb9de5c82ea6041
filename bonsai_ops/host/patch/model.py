"""The whole work of Patch to BitLinear: choose the layers, quantize them, spend what a target size leaves, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...quantize import Settings, Statistics
from ...weights.mapped import give_back_freed
from ..progress import Progress
from ..tensors import own_objects
from .assemble import assemble, empty_twin
from .carry import require_carried
from .layers import Layer, carried_out, convolutions, linear_layers, other_tensors, stored_bytes, tensors_to_keep
from .options import PatchOptions
from .report import LayerReport, Report, count_layers
from .spend import spend
from .work import Work, begin_work

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)


def patch_model(
    source: ModelPatcher,
    options: PatchOptions,
    statistics: Mapping[str, Statistics] | None = None,
    progress: Progress | None = None,
) -> tuple[ModelPatcher, Report]:
    """(packed ModelPatcher, report); with dry_run, or a target size that has room for all, the first is the source.

    statistics: {layer name: what its inputs were}. progress(weights done, weights in all) is called a layer; what it
    raises ends the work, and the source is as it was. Raises ValueError if nothing can be packed, if the model is made
    of layers that ComfyUI does not build through its operations, or for a weight that is not finite.
    """
    started = time.perf_counter()
    if not hasattr(source.model, "diffusion_model") or not hasattr(source.model, "model_config"):
        raise ValueError("this MODEL is no diffusion model of ComfyUI: it has no transformer or UNet to patch")
    try:
        with own_objects(source):
            return _patched(source, options, statistics or {}, progress, started)
    finally:
        give_back_freed()


def _patched(
    source: ModelPatcher,
    options: PatchOptions,
    statistics: Mapping[str, Statistics],
    progress: Progress | None,
    started: float,
) -> tuple[ModelPatcher, Report]:
    twin = empty_twin(source.model)
    require_carried(source, twin)
    work = begin_work(source, linear_layers(source, twin, options), options, statistics, progress)
    chosen = work.chosen
    for layer in chosen:
        work.counter.begin(layer.size)
        work.quantize(layer, options.settings)
    other_bytes = sum(tensor.nbytes for tensor in other_tensors(source, work.layers).values())
    notes = [] if options.target_bytes is None else [spend(work, other_bytes)]
    work.counter.end()
    packed = {layer.weight: layer.made.weight for layer in work.layers if layer.made is not None}
    if options.dry_run:
        notes.append("dry run: the model goes through unchanged")
    elif not packed:
        notes.append("the whole model has room within the target size: it goes through unchanged")
    if statistics:
        without = [layer.name for layer in chosen if layer.name not in statistics]
        notes.append(count_layers("calibrated", len(chosen), without))
    report = _report(work, other_bytes, time.perf_counter() - started, notes)
    if options.dry_run or not packed:
        return source, report
    tensors = {**tensors_to_keep(source, work.layers), **packed}
    patcher = assemble(source, twin, tensors, carried_out(source, work.layers))
    logger.info(
        "Bonsai: %s: %d layers packed, %.1f MB, relative error %.4f, %.1f s",
        report.title,
        len(packed),
        report.nbytes / 1e6,
        report.total("relative"),
        report.seconds,
    )
    return patcher, report


def _report(work: Work, other_bytes: int, seconds: float, notes: list[str]) -> Report:
    layers = [_layer_report(work.source, layer) for layer in work.layers]
    title = f"{type(work.source.model).__name__}, {_described(work.options.settings)}"
    return Report(title, layers, other_bytes, convolutions(work.source), seconds, notes)


def _described(settings: Settings) -> str:
    rank = f", rank {settings.rank}" if settings.rank else ""
    return f"{settings.recipe}, groups of {settings.group_size}{rank}"


def _layer_report(source: ModelPatcher, layer: Layer) -> LayerReport:
    if layer.made is None:
        return LayerReport(layer.name, "kept", layer.shape, stored_bytes(source, layer), reason=layer.kept or "")
    weight = layer.made.weight
    return LayerReport(layer.name, layer.recipe, layer.shape, weight.nbytes, layer.made.error, rank=weight.rank)
