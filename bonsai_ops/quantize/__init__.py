"""Post-training quantization of dense linear weights to 1 bit, three levels, 4 or 8 bit. Knows no ComfyUI and no files.

statistics.py  what goes into layers, recorded while they are called
groups.py      codes and scales of a group: the least-squares optimum in closed form
compensate.py  codes chosen column by column, each error made good in the columns to come (GPTQ)
lowrank.py     a 16-bit low-rank residual for what the codes leave over
layer.py       one layer with all of it, and how far it is from the dense one
budget.py      which layers keep more bits when the whole model may have a given size
recover.py     the residuals of a whole model trained together
"""

from __future__ import annotations

from .layer import (
    AFFINE,
    GROUP_SIZES,
    RECIPES,
    LayerError,
    Quantized,
    Settings,
    fitting_group,
    measured,
    quantize_layer,
    recipe_of,
)
from .statistics import DETAILS, Recorder, Statistics, thinned

__all__ = [
    "AFFINE",
    "DETAILS",
    "GROUP_SIZES",
    "RECIPES",
    "LayerError",
    "Quantized",
    "Recorder",
    "Settings",
    "Statistics",
    "fitting_group",
    "measured",
    "quantize_layer",
    "recipe_of",
    "thinned",
]
