"""A patch under way: the layers of a source, and how each becomes a packed weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import torch

from ...quantize import Quantized, Settings, Statistics, quantize_layer
from ..progress import Counter, Progress
from .layers import Layer, dense_weight
from .options import PatchOptions

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class Work:
    """layers: all linear layers of the source in model order. statistics: {layer name: what its inputs were}."""

    source: ModelPatcher
    layers: Sequence[Layer]
    options: PatchOptions
    statistics: Mapping[str, Statistics]
    counter: Counter

    @property
    def chosen(self) -> list[Layer]:
        """The layers to be packed."""
        return [layer for layer in self.layers if layer.kept is None]

    def quantize(self, layer: Layer, settings: Settings) -> None:
        """Settles what a layer becomes. Raises ValueError as `quantized` does."""
        layer.made, layer.recipe = self.quantized(layer, settings), settings.recipe

    def quantized(self, layer: Layer, settings: Settings) -> Quantized:
        """A layer packed on the load device, or by the processor if its memory is too small; on the offload device.

        Raises ValueError for a weight that is not finite.
        """
        try:
            made = self._on(self.source.load_device, layer, settings)
        except torch.OutOfMemoryError:
            comfy.model_management.soft_empty_cache()
            made = self._on(torch.device("cpu"), layer, settings)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}. Exclude the layer, or load the model's file again.") from error
        return Quantized(made.weight.to(self.source.offload_device), made.error, made.squared)

    def _on(self, device: torch.device, layer: Layer, settings: Settings) -> Quantized:
        return quantize_layer(dense_weight(self.source, layer, device), settings, self.statistics.get(layer.name))


def begin_work(
    source: ModelPatcher,
    layers: Sequence[Layer],
    options: PatchOptions,
    statistics: Mapping[str, Statistics],
    progress: Progress | None,
) -> Work:
    """The work on these layers. Raises ValueError if none is to be packed or statistics are of another model."""
    chosen = [layer for layer in layers if layer.kept is None]
    if not chosen:
        reasons = sorted({layer.kept for layer in layers}) or ["the model has no linear layer"]
        raise ValueError(f"nothing is left to pack: {'; '.join(reasons)}")
    for layer in chosen:
        known = statistics.get(layer.name)
        if known is not None and known.power.shape != (layer.shape[1],):
            raise ValueError(
                f"the calibration has {known.power.shape[0]} inputs for {layer.name}, the model {layer.shape[1]}: it "
                "was recorded with another model"
            )
    rounds = 1 if options.target_bytes is None else 1 + len(options.finer)
    counter = Counter(rounds * sum(layer.size for layer in chosen), progress)
    return Work(source, layers, options, statistics, counter)
