"""gemlite in safetensors, as diffusers' gemlite quantizer saves a transformer: second-hand, from its open pull request.

The tensors are those of gemlite_layer.py under diffusers names, in `transformer/diffusion_pytorch_model.safetensors`.
The `config.json` beside it has the settings that they were packed with:

    {"quantization_config": {
        "quant_method": "gemlite", "bits": 2, "group_size": 128, "packing_bitwidth": 8 | 16 | 32 | 64,
        "scales_dtype", "zeros_dtype", "input_dtype", "output_dtype": "fp16" | "bf16" | "fp32" (or float16 ..),
        "format": "gemlite-int2-ternary-g128" | null, "solver": "ternary" | null,
        "quantized_fqns": [names of the packed layers] | null, "modules_to_not_convert": [..] | null, ..}}

The metadata of each layer says everything that its values need, so the settings may be missing; where they are there,
each must agree with the tensors. A layer is packed if quantized_fqns names it (or is null) and modules_to_not_convert
names neither it nor a part of its path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import PackError
from ..files import is_file
from ..json_file import read_json
from .entries import Pack
from .gemlite_layer import DTYPES, Layer, Stored, read_tensors
from .safetensors_file import SafetensorsFile

NAME = "gemlite in safetensors"
FILE = SafetensorsFile
PLACES = {"transformer": ("transformer/diffusion_pytorch_model.safetensors",)}
CONFIG = "config.json"
SETTINGS = "quantization_config"
METHOD = "gemlite"
AS_PUBLISHED = "Use the file as it was published."
CURE = (
    "File and config.json must belong together: use both as they were published, and if config.json is of another "
    "model, take it away."
)
DTYPE_NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
MAX_SKIPPED = 512
"""Names of modules that are not packed; each is looked for in each layer's."""
FORMAT = re.compile(r"gemlite-int(\d+)(?:-.+)?-g(\d+)")
"""What `format` says of bits and group size."""


def claims(file: SafetensorsFile) -> bool:
    """True if some layer has codes called W_q and one of gemlite's tables beside them."""
    return any(
        name.endswith(".W_q") and any(f"{name[:-4]}.{leaf}" in file.tensors for leaf in ("scales", "metadata"))
        for name in file.tensors
    )


def read(file: SafetensorsFile) -> Pack:
    """Every tensor; packed layers are keyed `<layer>.weight` like dense ones."""
    entries, layers = read_tensors(Stored(file, file.tensors, file.get, AS_PUBLISHED))
    config = file.path.parent / CONFIG
    content = read_json(config) if is_file(config) else None
    settings = content.get(SETTINGS) if isinstance(content, dict) else None
    if settings is not None:
        _require_agreement(config, settings, layers)
    return Pack(file.path, NAME, entries)


def _error(config: Path, name: str, found: str) -> PackError:
    return PackError(config, found, CURE, f"{SETTINGS}.{name}" if name else SETTINGS)


def _require_agreement(config: Path, settings: Any, layers: Sequence[Layer]) -> None:
    """Raises PackError for a setting that does not fit the tensors; names it and the first such layer."""
    if not isinstance(settings, dict):
        raise _error(config, "", f"is a {type(settings).__name__}, not a table of settings")
    method = settings.get("quant_method")
    if method is not None and method != METHOD:
        raise _error(config, "quant_method", f"says {method!r}, but the file is packed by {METHOD}")
    for layer in layers:
        for name, real in _numbers_of(layer).items():
            told = settings.get(name)
            if told is not None and (isinstance(told, bool) or told != real):
                raise _error(config, name, f"says {told!r}, but {layer.name} has {real}")
        for name, real in _dtypes_of(layer).items():
            told = settings.get(name)
            if told is not None and _dtype(config, name, told) != real:
                raise _error(config, name, f"says {told}, but {layer.name} has {str(real).removeprefix('torch.')}")
        _require_description(config, settings, layer)
    _require_names(config, settings, dict.fromkeys(layer.name for layer in layers))


def _numbers_of(layer: Layer) -> dict[str, int]:
    return {
        "bits": layer.metadata["W_nbits"],
        "group_size": layer.metadata["group_size"],
        "packing_bitwidth": layer.word_bits,
    }


def _dtypes_of(layer: Layer) -> dict[str, torch.dtype]:
    tables = {f"{leaf}_dtype": layer.dtype(leaf) for leaf in ("scales", "zeros")}
    computed = {f"{side}_dtype": DTYPES.get(layer.metadata[f"{side}_dtype"]) for side in ("input", "output")}
    return {name: dtype for name, dtype in (tables | computed).items() if dtype in DTYPES.values()}


def _dtype(config: Path, name: str, told: Any) -> torch.dtype:
    dtype = DTYPE_NAMES.get(str(told).removeprefix("torch."))
    if dtype is None:
        raise _error(config, name, f"says {told!r}, which is none of fp16, bf16 and fp32")
    return dtype


def _require_description(config: Path, settings: Mapping[str, Any], layer: Layer) -> None:
    bits, group_size = layer.metadata["W_nbits"], layer.metadata["group_size"]
    described = FORMAT.fullmatch(str(settings.get("format")))
    if described is not None and (int(described[1]), int(described[2])) != (bits, group_size):
        has = f"{layer.name} has {bits} bits in groups of {group_size}"
        raise _error(config, "format", f"says {settings['format']!r}, but {has}")
    if settings.get("solver") == "ternary" and bits == 1:
        raise _error(config, "solver", f"says 'ternary', but {layer.name} has 1 bit")


def _require_names(config: Path, settings: Mapping[str, Any], packed: Collection[str]) -> None:
    named = settings.get("quantized_fqns")
    skipped = settings.get("modules_to_not_convert")
    skipped = [skipped] if isinstance(skipped, str) else skipped or []
    for name, value in (("quantized_fqns", [] if named is None else named), ("modules_to_not_convert", skipped)):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value if v is not None):
            raise _error(config, name, "is no list of names")
    if len(skipped) > MAX_SKIPPED:
        raise _error(config, "modules_to_not_convert", f"has {len(skipped)} names, more than {MAX_SKIPPED}")
    listed = None if named is None else set(named)

    def skips(layer: str) -> bool:
        return any(f"{part}." in layer or part == layer for part in skipped if part is not None)

    for layer in packed:
        if skips(layer):
            raise _error(config, "modules_to_not_convert", f"names {layer}, which is packed")
        if listed is not None and layer not in listed:
            raise _error(config, "quantized_fqns", f"does not name {layer}, which is packed")
    for layer in named or ():
        if layer is not None and layer not in packed and not skips(layer):
            raise _error(config, "quantized_fqns", f"names {layer}, which is not packed")
