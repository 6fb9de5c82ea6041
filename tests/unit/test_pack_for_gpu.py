"""What is packed for a bare machine with a GPU: the right packages, its GPU's code, folders as unpack.py reads them."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import pack_for_gpu

from bonsai_ops.tools.bench.gpu_check import unpack


def _fat_binary(*codes: tuple[int, int, bytes]) -> bytes:
    """As nvcc writes it, around (kind, capability, code)."""
    inner = b""
    for kind, capability, code in codes:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", capability)
        inner += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(inner)) + inner


def test_code_for_other_gpus_is_left_out_of_the_archive(tmp_path: Path) -> None:
    file, one, two = tmp_path / "a.so", b"one " * 8, b"two " * 16
    whole = b"ELF" + _fat_binary((2, 80, one), (2, 90, two)) + b"between" + _fat_binary((1, 120, one), (2, 90, two))
    file.write_bytes(whole)
    assert pack_for_gpu.strip(file, [90]) == 2 * len(one)
    assert file.read_bytes() == whole.replace(one, bytes(len(one)))
    file.write_bytes(whole)
    assert pack_for_gpu.strip(file, [89]) == 0 and file.read_bytes() == whole
    file.write_bytes(whole[:60])
    assert pack_for_gpu.strip(file, [90]) == 0 and file.read_bytes() == whole[:60]


def test_packages_are_those_that_comfyui_pins() -> None:
    text = "comfy-kitchen==0.2.26\ntorch\nSQLAlchemy>=2.0.0 # a database\npydantic~=2.0\n"
    asked = ["comfy-kitchen", "SQLAlchemy", "pydantic", "pydantic-core", "Mako"]
    assert pack_for_gpu.pinned(asked, text) == ["comfy-kitchen==0.2.26", "SQLAlchemy>=2.0.0", "pydantic~=2.0", "Mako"]


def test_what_was_packed_is_laid_out(tmp_path: Path) -> None:
    """tests.pack_for_gpu writes what unpack reads."""
    for name in ("keep/a.py", "tests/b.py", "keep/__pycache__/a.pyc"):
        (tmp_path / "comfyui" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "comfyui" / name).write_text("", encoding="ascii")
    pack_for_gpu.write(tmp_path / unpack.COMFYUI, tmp_path / "comfyui", pack_for_gpu.LEFT_OUT)
    with tarfile.open(tmp_path / unpack.COMFYUI) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    found = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.*")}
    assert found == {"keep/a.py"}
