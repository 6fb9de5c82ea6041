"""gemlite packs: `transformer-gemlite-int1/state_dict.pt` and `transformer-gemlite-int2/state_dict.pt`.

One pickled flat dict (zip format) of tensors: the leaves of gemlite_layer.py for each quantized layer, under diffusers
names, and `<layer>.weight`, BF16, for each dense one. In the published packs codes lie in bytes and

    w[n, k] = code[n, k] * scales[k // 128, n] + zeros[k // 128, n]            in float32, rounded once

with fp32 tables, zeros = -scales in the ternary and -scales / 2 in the binary pack; there is no meta_scale.
"""

from __future__ import annotations

import torch

from .entries import Pack
from .gemlite_layer import Stored, read_tensors
from .torch_file import TorchFile

NAME = "gemlite"
FILE = TorchFile
PLACES = {"transformer": ("transformer-gemlite-int2/state_dict.pt", "transformer-gemlite-int1/state_dict.pt")}
AS_PUBLISHED = "Use state_dict.pt as it was published."


def claims(file: TorchFile) -> bool:
    """Any torch file that is no text encoder's."""
    return True


def read(file: TorchFile) -> Pack:
    """Every tensor; packed layers are keyed `<layer>.weight` like dense ones."""
    content = file.content
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise file.error(f"is a {type(value).__name__}", "Expected nothing but tensors. " + AS_PUBLISHED, str(key))
    described = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in content.items()}
    entries, _ = read_tensors(Stored(file, described, content.__getitem__, AS_PUBLISHED))
    return Pack(file.path, NAME, entries)
