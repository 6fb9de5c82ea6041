"""Pages of mapped files are given back where that loses nothing."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from resident import anonymous, resident
from safetensors.torch import save_file

from bonsai_ops.weights import mapped
from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile
from bonsai_ops.weights.mapped import SMAPS, give_back, give_back_freed

pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="only Linux tells which pages are a file's")
BYTES = 8 << 20
PAGE = 4096


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randint(0, 256, (BYTES // PAGE, PAGE), dtype=torch.uint8)


@pytest.fixture
def file(tmp_path: Path, values: torch.Tensor) -> SafetensorsFile:
    save_file({"codes": values, "other": values[:1].clone()}, tmp_path / "file.safetensors")
    return SafetensorsFile(tmp_path / "file.safetensors")


def test_pages_of_a_file_are_given_back_and_read_again(file: SafetensorsFile, values: torch.Tensor) -> None:
    codes = file.get("codes")
    assert torch.equal(codes, values) and resident(file.path) >= BYTES
    assert give_back([codes]) >= BYTES
    assert resident(file.path) < BYTES / 8
    assert torch.equal(codes, values)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps little")
def test_what_was_freed_leaves_the_process() -> None:
    """Pieces too small to be mapped one by one, below one that stays."""
    pieces = [bytes([97]) * 100_000 for _ in range(2000)]
    last, before = pieces.pop(), anonymous()
    pieces.clear()
    kept = anonymous()
    give_back_freed()
    assert before - kept < 50_000_000 and kept - anonymous() > 150_000_000 and last[0] == 97


def test_what_was_written_to_is_kept(file: SafetensorsFile) -> None:
    """One changed tensor keeps the whole file in memory."""
    codes, other = file.get("codes"), file.get("other")
    other.zero_()
    assert int(codes.max()) == 255
    assert give_back([codes]) == 0
    assert resident(file.path) >= BYTES and not other.any()


def test_memory_of_no_file_is_kept(values: torch.Tensor) -> None:
    before = values.clone()
    assert give_back([values, torch.empty(0), torch.empty(4, device="meta")]) == 0
    assert torch.equal(values, before)


@pytest.mark.parametrize("told", ["/proc/self/mem", "/proc/self", "/nowhere"])
def test_a_system_that_tells_nothing_keeps_all(
    told: str, file: SafetensorsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/self/mem opens and cannot be read at its begin."""
    monkeypatch.setattr(mapped, "SMAPS", Path(told))
    codes = file.get("codes")
    assert int(codes.max()) == 255
    assert give_back([codes]) == 0 and resident(file.path) >= BYTES


def test_without_a_handle_all_is_kept(file: SafetensorsFile) -> None:
    """A picture is not lost because a process that is out of handles cannot look at itself."""
    resource = pytest.importorskip("resource")
    codes = file.get("codes")
    assert int(codes.max()) == 255
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert give_back([codes]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert give_back([codes]) >= BYTES


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"Anonymous": 0, "Private_Hugetlb": 0, "Swap": 0}, BYTES),
        ({"Anonymous": 0, "Private_Hugetlb": BYTES >> 10, "Swap": 0}, 0),
        ({"Rss": BYTES >> 10}, 0),
    ],
    ids=["a file", "huge pages", "not told"],
)
def test_what_may_be_of_no_file_is_kept(
    fields: dict[str, int], given: int, file: SafetensorsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives huge pages the number of a file and counts none of them as Anonymous: given back they are zeros.

    Told as it tells them, at the address of a mapped file, which loses nothing.
    """
    codes = file.get("codes")
    first = codes.data_ptr() // PAGE * PAGE
    head = f"{first:x}-{first + BYTES:x} rw-p 00000000 00:11 337463                     /anon_hugepage (deleted)"
    told = [head, *(f"{name + ':':16}{value:8} kB" for name, value in fields.items()), ""]
    (tmp_path / "smaps").write_text("\n".join(told), encoding="ascii")
    monkeypatch.setattr(mapped, "SMAPS", tmp_path / "smaps")
    assert give_back([codes]) == given
