"""Post-training quantization of dense linear weights to 1 bit, three levels or 4 bit. Knows no ComfyUI and no files.

groups.py      codes and scales of a group: the least-squares optimum in closed form
compensate.py  codes chosen column by column, each error made good in the columns to come (GPTQ)
lowrank.py     a 16-bit low-rank branch for what the codes leave over
layer.py       one layer with all of it, and how far it is from the dense one
budget.py      which layers keep more bits when the whole model may have a given size
report.py      the result as text, as CSV and as a picture
"""

from __future__ import annotations

from .layer import LayerError, Quantized, Settings, Statistics, fitting_group, quantize_layer

__all__ = ["LayerError", "Quantized", "Settings", "Statistics", "fitting_group", "quantize_layer"]
