"""Any diffusion MODEL of ComfyUI -> the same with few-bit linear layers: what "Patch to BitLinear" does.

The result is a second model of the source's own class, made with our operations (linear.py), so that LoRAs, offload,
clones and saving work as with a loaded pack. The source is only read. What was set on it (LoRAs, model sampling,
wrappers, options) goes along or is refused; a merge of models is carried out first, as its result is what is to be
packed.

options.py    what is asked for
layers.py     the linear layers: which are packed, their dense weights
work.py       a patch under way: each of them quantized
spend.py      which layers get more bits within a target size
carry.py      what was set on the source
assemble.py   the packed MODEL
model.py      all of it
report.py     what became of every layer, as text, CSV and picture
calibrate.py  what goes into the layers in a sampling, for work.py
measure.py    what the packed layers are worth in a sampling
recover.py    residuals trained together against the source: "Recover BitLinear"; points.py, recovered.py are its parts
"""

from __future__ import annotations

from ...quantize import RECIPES
from .model import patch_model
from .options import EXCLUDED, PatchOptions, patterns

__all__ = ["EXCLUDED", "RECIPES", "PatchOptions", "patch_model", "patterns"]
