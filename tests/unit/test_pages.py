"""Pages of mapped files are given back where that loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resident import resident
from safetensors.torch import save_file

from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile
from bonsai_ops.weights.mapped import SMAPS, give_back

pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="only Linux tells which pages are a file's")
BYTES = 8 << 20


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randint(0, 256, (BYTES // 4096, 4096), dtype=torch.uint8)


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
