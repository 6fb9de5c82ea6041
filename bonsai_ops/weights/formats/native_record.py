"""What a native file says of itself, as JSON in its metadata or in a tensor: native.py describes where.

A record is compared with the tensors. What goes on to ComfyUI, the configuration of a model of another architecture,
has the form of one and no number that the tensors could not bear out: see `require_modest`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import __version__
from ..errors import PackError
from ..json_file import MAX_BYTES, parse_json
from .entries import DOWNLOAD_AGAIN
from .safetensors_file import SafetensorsFile

VERSION = 2
RECORD, RECORD_TENSOR = "bonsai", "bonsai.record"
MAX_LIST, MAX_TEXT = 64, 256
"""Values of a list and characters of a text in a configuration."""
COUNTS = re.compile(r"depth|layers|blocks|repeats|num_res|_mult\b|levels|stages")
"""In names of a configuration: what is made so often, each time with a tensor of its own at least."""
FREE = re.compile(r"theta|period|freq|scale|factor|eps|ratio|shift|sigma")
"""The same: what is computed with and makes nothing."""
POSITIONS = re.compile(r"(?<!num)_layers$")
"""Names of lists that say which, not how many: HiDream's llama_layers, 48 numbers up to 31."""
MAX_COUNT, MAX_PRODUCT = 512, 2048
"""The most that one of these may be, and the longest list of them times the largest: a UNet has so many a level."""
LARGEST = 1 << 24
"""Of the numbers that nothing is made of."""
TIMES_WIDEST, MIN_WIDTH = 4, 1 << 16
"""A width is at most so many times that of the widest tensor, or the other where that is less: ACE-Step counts
positions up to 32,768, whatever its tensors are."""
MAX_STEPS = 100_000
"""Of settings of sampling: the tables that ComfyUI makes of them have so many values."""


@dataclass(frozen=True)
class NativeRecord:
    """The metadata of a native file. `layers` maps a layer name to scheme, codec, group_size and shape."""

    variant: str
    layers: Mapping[str, Mapping]
    source: Mapping[str, str] = field(default_factory=dict)
    architecture: str = "flux2"
    version: int = 1
    packer: str = f"bonsai-image {__version__}"
    model: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """What the metadata holds."""
        described = {name: value for name, value in vars(self).items() if name != "model" or value}
        return json.dumps(described, sort_keys=True)

    def to_tensor(self) -> torch.Tensor:
        """What stands in a file that ComfyUI saves, as RECORD_TENSOR."""
        return torch.frombuffer(bytearray(self.to_json(), "utf-8"), dtype=torch.uint8)


def read_records(file: SafetensorsFile) -> dict[str, NativeRecord]:
    """{prefix of the layers it describes: record}. Raises PackError for a damaged one or a newer version."""
    found = {}
    for name, (shape, dtype) in file.tensors.items():
        if name.endswith(RECORD_TENSOR):
            if dtype != torch.uint8 or len(shape) != 1 or shape[0] > MAX_BYTES:
                raise file.error(
                    f"is {dtype} {list(shape)}", f"Expected u8 [bytes], at most {MAX_BYTES}. {DOWNLOAD_AGAIN}", name
                )
            found[name.removesuffix(RECORD_TENSOR)] = _parsed(file, name, file.get(name).numpy().tobytes())
    if not found and RECORD in file.metadata:
        found[""] = _parsed(file, RECORD, file.metadata[RECORD])
    return found


def _parsed(file: SafetensorsFile, key: str, text: str | bytes) -> NativeRecord:
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text)} bytes")
        record = parse_json(text)
        version = int(record["version"])
        if version > VERSION:
            raise file.error(
                f"is version {version} of the native format, this plugin reads up to {VERSION}",
                "Update bonsai-image.",
                key,
            )
        layers, source, model = record["layers"], record.get("source") or {}, record.get("model") or {}
        if not all(isinstance(table, dict) for table in (layers, source, model)):  # dict() takes pairs too
            raise TypeError("layers, source and model are tables of names")
        found = NativeRecord(
            record["variant"], layers, source, record["architecture"], version, record.get("packer", ""), model
        )
        if not isinstance(found.architecture, str) or not isinstance(found.variant, str):
            raise TypeError("variant and architecture are texts")
        require_modest(file.tensors.values(), found.model)
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        if isinstance(error, PackError):
            raise
        raise file.error(f"has a damaged record ({error!r})", DOWNLOAD_AGAIN, key) from error
    return found


def require_modest(tensors: Iterable[tuple[tuple[int, ...], Any]], model: Mapping[str, Any]) -> None:
    """Raises ValueError for a configuration that asks for more than these (shape, dtype) hold, or is none.

    ComfyUI makes a model of it before a tensor is looked at: 10^9 blocks, or a table of 10^8 steps.
    """
    shapes = [shape for shape, _ in tensors]
    for name in ("class", "model_type"):
        if not isinstance(model.get(name, ""), str):
            raise TypeError(f"{name} is no text")
    for name in ("unet_config", "sampling_settings"):
        if not isinstance(model.get(name, {}), dict):
            raise TypeError(f"{name} is no table")
    widest = max([MIN_WIDTH, *(TIMES_WIDEST * max(shape, default=0) for shape in shapes)])
    most, longest = 0.0, 1
    for name, number, length in _numbers(model, ""):
        limit = LARGEST if FREE.search(name) else widest
        if name.startswith("sampling_settings"):
            limit = MAX_STEPS
        elif COUNTS.search(name):
            limit = min(len(shapes), MAX_COUNT)
            most, longest = max(most, abs(number)), longest if POSITIONS.search(name) else max(longest, length)
        if abs(number) > limit or most * longest > MAX_PRODUCT:
            raise ValueError(f"{name} is {number}, more than the file has tensors for")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float, int]]:
    """(name with dots, number, how many it stands for) of all in a configuration; a list of counts counts together."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        if len(value) > MAX_LIST:
            raise ValueError(f"{name} has {len(value)} values")
        numbers = [v for v in value if isinstance(v, (int, float))]
        if numbers:
            of_all = max if POSITIONS.search(name) else sum
            yield name, of_all(map(abs, numbers)), len(numbers)
        for inner in value:
            if not isinstance(inner, (int, float)):
                yield from _numbers(inner, name)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"{name} has {len(value)} characters")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value, 1
