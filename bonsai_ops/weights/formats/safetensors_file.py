"""Reading a .safetensors file: header first, tensors mapped from disk when asked for.

Bytes: u64 little-endian header length H, H bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]},
"__metadata__": {str: str}}, then the tensor data, offsets counted from 8 + H.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import unreadable
from ..json_file import parse_json
from ..releases import Census, count
from .entries import DenseTensor
from .file import PackFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U32": torch.uint32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER = 8 << 20
"""Bytes; that of the text encoder of the MLX releases, the longest published, has 102,329."""
MAX_NUMBER = 1 << 62
DOWNLOAD_AGAIN = "The file is damaged or its download was cut off: download it again."


def _whole(number: int) -> int:
    """A size or place in a file. Raises ValueError for anything else."""
    if type(number) is not int or not 0 <= number < MAX_NUMBER:
        raise ValueError(f"{type(number).__name__} is no size")
    return number


def _place(offsets: Sequence[int]) -> tuple[int, int]:
    start, stop = map(_whole, offsets)
    return start, stop


class SafetensorsFile(PackFile):
    """An open file. `tensors`: {name: (shape, torch dtype)}; `metadata`: {str: str}.

    Raises PackError for a file that is not safetensors, is cut off or has a dtype torch does not know.
    """

    SUFFIXES = (".safetensors", ".sft")

    def __init__(self, path: Path, mapped: bool = True) -> None:
        super().__init__(path, mapped)
        size, raw = self.size, self._read_header()
        length = len(raw)
        try:
            header = parse_json(raw)
        except ValueError as error:
            raise self.error(f"has a header that is not JSON ({error})", DOWNLOAD_AGAIN) from error
        if not isinstance(header, dict):
            raise self.error("has a header that is no table of tensors", DOWNLOAD_AGAIN)
        self.require_few(len(header) - ("__metadata__" in header))
        self._header_bytes: int | None = length
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise self.error("has a header whose __metadata__ is no table of texts", DOWNLOAD_AGAIN)
        self.require_few_words(len(self.metadata))
        try:
            described = {
                name: (str(e["dtype"]), tuple(map(_whole, e["shape"])), *_place(e["data_offsets"]))
                for name, e in header.items()
            }
        except (TypeError, KeyError, ValueError, IndexError, OverflowError) as error:
            raise self.error("has a header that is no table of tensors", DOWNLOAD_AGAIN) from error
        end = 8 + length + max((stop for *_, stop in described.values()), default=0)
        if size != end:
            raise self.error(f"has {size} bytes, its header describes {end}", DOWNLOAD_AGAIN)
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, (dtype, shape, *_) in described.items():
            if dtype not in DTYPES:
                raise self.error(f"has dtype {dtype}", f"Expected one of {', '.join(DTYPES)}.", name)
            self.tensors[name] = (shape, DTYPES[dtype])
        self._places = {name: (8 + length + start, stop - start) for name, (_, _, start, stop) in described.items()}
        self._require_places(8 + length)
        self._handle = None
        try:
            if mapped:
                self._handle = safe_open(str(path), framework="pt", device="cpu")
            self._stream = path.open("rb", buffering=0)
        except SafetensorError as error:
            raise self.unopened(error, f"has a damaged header ({error})", DOWNLOAD_AGAIN) from error
        except (MemoryError, OSError, RuntimeError) as error:  # torch: it has become shorter
            raise self.unopened(error, f"cannot be mapped ({error})", DOWNLOAD_AGAIN) from error

    def _require_places(self, at: int) -> None:
        """Raises PackError unless tensors lie one after another from byte `at` on, as long as dtype and shape say."""
        for name, (start, size) in sorted(self._places.items(), key=lambda entry: (*entry[1], entry[0])):
            shape, dtype = self.tensors[name]
            if start != at or size != math.prod(shape) * dtype.itemsize:
                found = f"has a damaged header ({dtype} {list(shape)} in {size} bytes at {start}, where {at} is free)"
                raise self.error(found, DOWNLOAD_AGAIN, name)
            at += size

    def _read_header(self) -> bytes:
        """The header's JSON. Raises PackError, for a long one before it is read."""
        size = self.size
        try:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 10 or length < 2 or length > max(MAX_HEADER, size - 8):
                    raise self.error(
                        f"is not a safetensors file ({size} bytes, first bytes are no header length)",
                        "Give a .safetensors file as it was published.",
                    )
                if length > MAX_HEADER:
                    raise self.error(
                        f"has a header of {length} bytes", f"Expected at most {MAX_HEADER}. {DOWNLOAD_AGAIN}"
                    )
                raw = file.read(length)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(raw) < length:
            raise self.error(f"ends inside its header ({size} bytes, the header alone has {length})", DOWNLOAD_AGAIN)
        return raw

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def said(self) -> Mapping[str, str]:
        return self.metadata

    def get(self, name: str) -> torch.Tensor:
        """The tensor called `name`; one that is mapped from the file is copied when something writes to it."""
        if self._handle is not None:
            return self._handle.get_tensor(name)
        shape, dtype = self.tensors[name]
        return self.read_bytes(self._stream, *self._places[name], name).view(dtype).view(shape)

    def copied_rows(self, name: str, lo: int, hi: int) -> torch.Tensor:
        """u8 [rows, bytes of a row] of the rows lo .. hi - 1 that a tensor of two dimensions or more has.

        Read into memory even where the file is mapped: pages that were looked at once would stay in the process.
        """
        (rows, *_), (start, size) = self.tensors[name][0], self._places[name]
        lo, hi = min(lo, rows), min(hi, rows)
        width = size // rows if rows else 0
        return self.read_bytes(self._stream, start + lo * width, (hi - lo) * width, name).view(hi - lo, width)

    def dense(self, name: str) -> DenseTensor:
        """The entry of a tensor that is handed over as it is."""
        return DenseTensor(self.path, name, *self.tensors[name], lambda: self.get(name))

    def census(self) -> Census:
        return count(self.tensors.values(), self._header_bytes)


class JoinedFile(SafetensorsFile):
    """The parts of a sharded model as one file, called like the first. Raises PackError for a tensor in two of them."""

    def __init__(self, paths: Sequence[Path], mapped: bool = True) -> None:
        PackFile.__init__(self, paths[0], mapped)
        self.metadata = {}
        self._header_bytes = None
        self.tensors = {}
        self._owners: dict[str, SafetensorsFile] = {}
        for part in (SafetensorsFile(path, mapped) for path in paths):
            for name in part.tensors:
                if name in self.tensors:
                    raise part.error(
                        f"stands in {self._owners[name].path.name} too", "Download the whole folder again.", name
                    )
                self._owners[name] = part
            self.tensors |= part.tensors
            self.metadata |= part.metadata
            self.require_few(len(self.tensors))

    def get(self, name: str) -> torch.Tensor:
        return self._owners[name].get(name)

    def copied_rows(self, name: str, lo: int, hi: int) -> torch.Tensor:
        return self._owners[name].copied_rows(name, lo, hi)
