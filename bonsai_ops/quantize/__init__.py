"""Post-training quantization of dense linear weights to 1 bit, three levels, 4 or 8 bit. Knows no ComfyUI and no files.

groups.py      codes and scales of a group: the least-squares optimum in closed form
compensate.py  codes chosen column by column, each error made good in the columns to come (GPTQ)
lowrank.py     a 16-bit low-rank residual for what the codes leave over
layer.py       one layer with all of it, and how far it is from the dense one
budget.py      which layers keep more bits when the whole model may have a given size
report.py      the result as text, as CSV and as a picture
"""

from __future__ import annotations

from .layer import SCHEMES, LayerError, Quantized, Settings, Statistics, fitting_group, measured, quantize_layer

__all__ = [
    "SCHEMES",
    "LayerError",
    "Quantized",
    "Settings",
    "Statistics",
    "fitting_group",
    "measured",
    "quantize_layer",
]
