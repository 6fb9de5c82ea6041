"""The log and Bonsai Model Info tell of a number of threads that cannot be right."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import load_device

from bonsai_ops.tools import synthetic

pytestmark = pytest.mark.host


@pytest.fixture
def too_many(comfy: Any) -> Iterator[int]:
    """One thread more than there are processors."""
    before, number = torch.get_num_threads(), 1 + (os.cpu_count() or 1)
    torch.set_num_threads(number)
    yield number
    torch.set_num_threads(before)


def test_it_is_told_once(
    comfy: Any, too_many: int, second_import: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the first transformer or text encoder that computes on a CPU, then never again."""
    synthetic.write_pipeline(tmp_path / "pack")
    load = importlib.import_module(f"{second_import}.host.pack").load_pack
    with caplog.at_level(logging.WARNING):
        loaded = [load(tmp_path / "pack") for _ in range(2)]
    devices = {loaded[0][0].load_device, loaded[0][1].patcher.load_device}
    told = [record.getMessage() for record in caplog.records if "threads, but" in record.getMessage()]
    assert len(told) == any(comfy.model_management.is_device_cpu(device) for device in devices)
    assert all(f"torch computes in {too_many} threads" in text and "_NUM_THREADS=" in text for text in told)
    assert torch.get_num_threads() == too_many


def test_the_info_has_a_line_of_it(comfy: Any, too_many: int, tmp_path: Path) -> None:
    """Of a model on a CPU; without the reason where nothing speaks against the number."""
    from bonsai_ops.host.info import describe
    from bonsai_ops.host.loader import load_bonsai_model

    synthetic.write_pipeline(tmp_path / "pack")
    model = load_bonsai_model(tmp_path / "pack")
    if not comfy.model_management.is_device_cpu(load_device()):
        assert "threads" not in dict(describe(model))
        return
    assert dict(describe(model))["threads"].startswith(f"{too_many}, but this process")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else too_many - 1)
    assert "may run on" not in dict(describe(model))["threads"]
