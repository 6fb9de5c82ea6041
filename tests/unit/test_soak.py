"""What python -m tests.soak finds wrong; the command itself starts a server."""

from __future__ import annotations

from soak import BASE, CYCLE, GRAPHS, REFUSED, Held, Soak


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
