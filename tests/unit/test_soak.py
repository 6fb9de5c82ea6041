"""What python -m tests.soak finds wrong; the command itself starts a server."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from soak import BASE, CYCLE, GRAPHS, REFUSED, SYSTEM, Held, Soak, held_by, settled


def test_every_kind_has_its_graph() -> None:
    assert set(CYCLE) == set(GRAPHS) and set(REFUSED) <= set(GRAPHS)


def test_what_does_not_hold_is_told() -> None:
    def after(memory: int, files: tuple[int, ...] = (10,), threads: tuple[int, ...] = (5,)) -> list[str]:
        run = Soak(64, 1)
        run.held = [Held(100, 10, 5)] * (BASE // len(CYCLE))
        run.held += [
            Held(memory, files[n % len(files)], threads[n % len(threads)]) for n in range(len(files) * len(threads) * 4)
        ]
        return run.faults()

    assert after(102) == [] and after(98) == []
    assert ["memory grew" in fault for fault in after(104)] == [True]
    assert after(100, files=(11,)) == ["files grew from 10 to 11"]
    assert after(100, files=(11, 12)) == ["files grew from 10 to 11"]
    assert after(100, files=(10, 11)) == after(100, files=(11, 11, 10)) == [], "open at the moment of one look"
    assert after(100, threads=(6,)) == ["threads grew from 5 to 6"]


@pytest.mark.skipif(not SYSTEM.exists(), reason="only Linux tells what a process holds")
def test_a_file_that_is_just_being_closed_is_none() -> None:
    before = held_by(os.getpid())
    with Path(__file__).open() as file:
        assert held_by(os.getpid()).files == before.files + 1
        threading.Timer(0.3, file.close).start()
        assert settled(os.getpid(), [before]).files == before.files
