"""Which published file a file is: told by its size and header, by its sha256 where that is cheap or already computed.

A file of gigabytes is not read for its hash: another model of the same tensors, saved by the same code, is as long and
looks the same from outside. Sizes and hashes are second-hand: manifests and header dumps that others published.
The int1 gemlite file and the HQQ text encoder are missing, because nobody told their exact sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import shown

UNKNOWN = "unknown file"
HASH_BYTES = 16 << 20
CHEAP_BYTES = 256 << 20
"""A file up to this size is hashed."""
CODES = (torch.uint32, torch.uint8)
"""Dtypes of codes."""


@dataclass(frozen=True)
class Census:
    """A file from outside. header: bytes of a safetensors file's JSON, None for another container.

    tensors: how many it has. coded: how many of them are matrices of a dtype of CODES. bf16: how many are bfloat16.
    """

    header: int | None = None
    tensors: int = 0
    coded: int = 0
    bf16: int = 0


@dataclass(frozen=True)
class Release:
    """A published file. size: in bytes. header: bytes of a safetensors file's JSON, None where nobody told.

    tensors, coded, bf16: as of a Census, None where nobody told. sha256: empty where nobody told all of it.
    """

    name: str
    size: int
    header: int | None
    tensors: int
    coded: int
    sha256: str = ""
    bf16: int | None = None

    def fits(self, size: int, census: Census) -> bool:
        """Whether a file of this size and census looks like it."""
        return (
            (size, census.tensors, census.coded) == (self.size, self.tensors, self.coded)
            and self.header in (None, census.header)
            and self.bf16 in (None, census.bf16)
        )


RELEASES = (
    Release(
        "PrismML ternary, MLX release",
        1_425_271_472,
        44_712,
        369,
        100,
        "b21737bdf02690b7d662907781c4dc8b8bf22a2c98b823b1ca3336f48371a84f",
        bf16=269,
    ),
    Release(
        "PrismML binary, MLX release",
        965_208_136,
        44_096,
        369,
        100,
        "1792b31d857d95fcbe32df8e6d2fc96b30e800a195e295565d033deccea2dd75",
        bf16=269,
    ),
    Release(
        "PrismML ternary, gemlite release",
        1_540_457_482,
        None,
        569,
        100,
        "a3a7df8a90374fea24afce3b36f00b4c728d0254717143d61f912a7b3070e7ac",
        bf16=69,
    ),
    Release("PrismML ternary or binary, unpacked release", 7_751_109_712, 20_552, 169, 0, bf16=169),
    Release("Qwen3-4B-4bit of mlx-community, the text encoder of the MLX releases", 2_263_022_529, 102_329, 904, 253),
    Release(
        "FLUX.2 Klein 4B's VAE, which all releases have",
        168_120_878,
        None,
        251,
        0,
        "ca70d2202afe6415bdbcb8793ba8cd99fd159cfe6192381504d6c4d3036e0f04",
    ),
    Release(
        "ternary seedling, shipped with this plugin",
        4_356_736,
        10_872,
        73,
        24,
        "b910394f34928474744db5dd09678224a75786ea3730a67bc744d5e0c2bf0557",
    ),
    Release(
        "binary seedling, shipped with this plugin",
        3_791_360,
        10_744,
        73,
        24,
        "32d9fd6419fcc7b264b40dbb0780ead33291bdce39be0dc7667fcda8cd55d3a0",
    ),
    Release(
        "text encoder of the seedling, shipped with this plugin",
        1_484_912,
        71_584,
        679,
        190,
        "7bbf0d76fc9edf0ee2aff1b337aca8f166b65227eb3e8c062b02102c202c840e",
    ),
    Release(
        "VAE of the seedling, shipped with this plugin",
        2_436_966,
        7_672,
        80,
        0,
        "2f833f9129835ac59f2aff95d3a4d039f2eaa01eac138231bd4fc3f6e1ee70f7",
    ),
)
HASHED = {release.sha256: release.name for release in RELEASES if release.sha256} | {
    "fa5fd18239aadc41d3bec64810479fd3aed5182946f70e2d894f747cf4e35964": "PrismML ternary, unpacked release"
}
"""{sha256: name} of the files whose hash is known."""


def count(shapes: Iterable[tuple[Sequence[int], torch.dtype]], header: int | None = None) -> Census:
    """The census of a file with tensors of these (shape, dtype)."""
    found = list(shapes)
    return Census(
        header,
        len(found),
        sum(len(shape) == 2 and dtype in CODES for shape, dtype in found),
        sum(dtype == torch.bfloat16 for _, dtype in found),
    )


def release_of(path: Path, census: Census, source: Mapping[str, str] | None = None) -> str:
    """What to call a file: a release and how it was told, what it says that it was made from, or UNKNOWN.

    census: of the opened file. source: of a native file, its record of what it was made from.
    """
    try:
        size = path.stat().st_size
    except OSError:  # it was taken away after it was opened
        size = -1
    for release in RELEASES:
        if not release.fits(size, census):
            continue
        if not release.sha256 or size > CHEAP_BYTES:
            return f"{release.name} (by size and header)"
        if sha256_of(path) == release.sha256:
            return f"{release.name} (by sha256)"
    return _made_from(source or {}) or UNKNOWN


def _made_from(source: Mapping[str, str]) -> str | None:
    """What a native file says that it was made from, None if it says nothing."""
    if "patched" in source:
        return "made by Patch to BitLinear"
    name = HASHED.get(str(source.get("sha256")), source.get("file"))
    return f"made from {shown(str(name), 80)}" if name else None


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()
