"""Pack formats. `open_pack(path)` takes a file or a pack folder, says what it is and hands over its tensors.

One file a format; each opens with the bytes. Nothing here knows ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PackError
from . import dense, gemlite, gguf, mlx, native
from .entries import CodedTensor, DenseTensor, Entry, PackedTensor
from .safetensors_file import SafetensorsFile

__all__ = ["CodedTensor", "DenseTensor", "Entry", "Pack", "PackError", "PackedTensor", "find_transformer", "open_pack"]

UNPACKED_FILE = "transformer/diffusion_pytorch_model.safetensors"
TRANSFORMER_FILES = (
    mlx.TRANSFORMER_FILE,
    *(f"{folder}/{gemlite.STATE_DICT}" for folder in gemlite.FOLDERS),
    UNPACKED_FILE,
    gemlite.STATE_DICT,
    "diffusion_pytorch_model.safetensors",
)
"""Where a transformer lies in a pack folder, or in the transformer's own folder."""


@dataclass(frozen=True)
class Pack:
    """An open transformer file. `format`: gemlite, mlx, gguf, unpacked, native. `entries`: {name in it: entry}."""

    path: Path
    format: str
    entries: Mapping[str, Entry]
    source: Mapping[str, str] = field(default_factory=dict)
    """For a native file: {"file": .., "sha256": ..} of what it was made from."""
    architecture: str = "flux2"
    model: Mapping[str, object] = field(default_factory=dict)
    """For a native file of another architecture: ComfyUI's configuration of it."""


def find_transformer(path: Path) -> Path:
    """The transformer file of a pack folder (or `path` itself if it is a file). Raises PackError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise PackError(path, "does not exist", "Put the pack under models/bonsai and refresh the page.")
    found = [path / name for name in TRANSFORMER_FILES if (path / name).is_file()]
    if not found:
        natives = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("."))
        if len(natives) == 1:
            return natives[0]
        raise PackError(
            path,
            "holds no transformer",
            "Expected one of " + ", ".join(TRANSFORMER_FILES[:4]) + ": download the whole repository into this folder.",
        )
    if len(found) > 1:
        raise PackError(
            path,
            f"holds several transformers: {', '.join(str(p.relative_to(path)) for p in found)}",
            "Choose one of these files instead of the folder.",
        )
    return found[0]


def open_pack(path: Path | str) -> Pack:
    """Opens a pack file or folder; reads headers only. Raises PackError for anything that is not one."""
    file = find_transformer(Path(path))
    if file.suffix in (".safetensors", ".sft"):
        opened = SafetensorsFile(file)
        if native.is_native(opened):
            record = native.read_record(opened)
            entries = native.read_entries(opened, record)
            if record is None:
                return Pack(file, "native", entries)
            return Pack(file, "native", entries, record.source, record.architecture, record.model)
        if mlx.is_mlx(opened):
            return Pack(file, "mlx", mlx.read_entries(opened, mlx.TRANSFORMER_BITS))
        return Pack(file, "unpacked", dense.read_entries(opened, floats_only=False))
    if file.suffix == ".pt":
        if file.name == "qmodel.pt":
            raise PackError(file, "is an HQQ text encoder", 'Load it with "Load Bonsai Text Encoder".')
        return Pack(file, "gemlite", gemlite.read_entries(file))
    if file.suffix == ".gguf":
        return Pack(file, "gguf", gguf.read_entries(file))
    raise PackError(
        file,
        f"has the unknown ending {file.suffix!r}",
        "Expected a .safetensors file (MLX, unpacked or native), a gemlite state_dict.pt or a .gguf file.",
    )
