"""A fused kernel or unpacking: what is faster is timed once, kept in a file, and never breaks a picture.

Both sides are real products on the CPU, and the timer says of each what the test wants it to take.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_weights import random_weight
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import recording

from bonsai_ops import bench, kernels
from bonsai_ops.kernels import choices as store
from bonsai_ops.kernels import contest, dispatch, eager
from bonsai_ops.kernels.choices import FUSED, UNPACK, Choices, Timed
from bonsai_ops.weights.packed_weight import PackedWeight

ROWS, COLUMNS = 256, 512
CPU = torch.device("cpu")
KEY = contest.Key("cpu", "", "float32", "ternary", "trit5", "exact", COLUMNS, ROWS, 512)


class Side:
    """A backend that is said to take `times` milliseconds, and raises `error` while it has one."""

    MODES = ("exact",)
    spent = threading.local()
    """ms: what all of a thread's calls took."""

    def __init__(self, name: str, times: int) -> None:
        self.NAME, self.times, self.calls = name, times, 0
        self.error: Exception | None = None

    def declines(self, call: kernels.Call) -> str | None:
        return None

    def multiply(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.spent.ms = getattr(self.spent, "ms", 0) + self.times
        return eager.multiply(x, weight, bias)


class Clock:
    """A timer for the CPU that counts how often it was asked, and says what the sides say they take."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        self.asked += 1
        return contest.in_turns(calls, self.once)

    def once(self, call: Callable[[], object]) -> float:
        begun = getattr(Side.spent, "ms", 0)
        call()
        return Side.spent.ms - begun


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    store._said.clear()
    next_start(monkeypatch)
    kernels.forget_failures()
    yield store.file_path()
    kernels.forget_failures()


def next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the file is forgotten, as by another process."""
    monkeypatch.setattr(contest, "choices", Choices())
    kernels.forget_failures()


def contested(monkeypatch: pytest.MonkeyPatch, fused: int, unpack: int) -> SimpleNamespace:
    """The two sides and the clock. fused, unpack: how slow they are."""
    found = SimpleNamespace(fused=Side("fused", fused), unpack=Side("unpack", unpack), clock=Clock())
    monkeypatch.setattr(dispatch, "BACKENDS", (found.fused, found.unpack, eager))
    monkeypatch.setattr(dispatch, "CONTESTED", (found.fused,))
    monkeypatch.setattr(dispatch, "RIVALS", (found.unpack,))
    monkeypatch.setitem(contest.timers, "cpu", found.clock)
    return found


def used(sides: SimpleNamespace, tokens: int, weight: PackedWeight | None = None) -> list[str]:
    """Who multiplied so many tokens, beside what was timed; the product is right."""
    weight = weight or random_weight("ternary", "trit5", ROWS, COLUMNS)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    for side in (sides.fused, sides.unpack):
        side.calls = 0
    assert torch.equal(kernels.linear(x, weight), eager.multiply(x, weight))
    return [side.NAME for side in (sides.fused, sides.unpack) if side.calls]


def kept(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))["choices"]


@pytest.mark.parametrize(("fused", "unpack"), [(8, 1), (1, 8)], ids=["unpack", "fused"])
def test_the_faster_one_multiplies_many_tokens(
    fused: int, unpack: int, own_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timed at the first product of each bucket, once for all layers of a shape; the fused one below 128 tokens."""
    sides = contested(monkeypatch, fused, unpack)
    faster = "unpack" if fused > unpack else "fused"
    for tokens in (1, 127):
        assert used(sides, tokens) == ["fused"]
    assert sides.clock.asked == 0 and not own_file.exists()
    for tokens, asked in ((128, 1), (512, 1), (513, 2), (1536, 2), (1537, 3), (5000, 3), (200, 3)):
        found = used(sides, tokens)
        assert sides.clock.asked == asked
        assert found == [faster] or (tokens in (128, 513, 1537) and faster in found)
    assert used(sides, 100) == ["fused"]
    assert [entry["faster"] for entry in kept(own_file).values()] == [faster] * 3
    for entry in kept(own_file).values():
        assert (entry["ms"]["unpack"] < entry["ms"]["fused"]) == (faster == "unpack")


def test_each_class_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtype, codec and shape; other layers of a class share what was timed."""
    sides = contested(monkeypatch, 1, 1)
    weight = random_weight("ternary", "trit5", ROWS, COLUMNS)
    others = [random_weight("ternary", "crumb", ROWS, COLUMNS), random_weight("ternary", "trit5", 264, COLUMNS)]
    for number, one in enumerate([weight, *others], start=1):
        for copied in (one, dataclasses.replace(one, scale=one.scale.clone())):
            used(sides, 128, copied)
            assert sides.clock.asked == number
    kernels.linear(torch.ones(128, COLUMNS, dtype=torch.bfloat16), weight)
    assert sides.clock.asked == 4


def test_the_next_start_chooses_the_same(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file, without timing, whatever it would say now."""
    sides = contested(monkeypatch, 8, 1)
    used(sides, 128)
    written = own_file.read_bytes()
    next_start(monkeypatch)
    sides.fused.times, sides.unpack.times = 1, 8
    assert used(sides, 300) == ["unpack"] and sides.clock.asked == 1 and own_file.read_bytes() == written
    assert used(sides, 600) and sides.clock.asked == 2
    own_file.unlink()
    next_start(monkeypatch)
    used(sides, 128)
    assert used(sides, 128) == ["fused"] and sides.clock.asked == 3


def test_another_version_times_again(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = contested(monkeypatch, 8, 1)
    used(sides, 128)
    next_start(monkeypatch)
    monkeypatch.setattr(contest, "_versions", lambda: "another")
    used(sides, 128)
    assert sides.clock.asked == 2 and len(kept(own_file)) == 2


def test_a_shipped_row_goes_first(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what the file says, and without timing. Each row names a side."""
    assert set(contest.SHIPPED.values()) <= {FUSED, UNPACK}
    sides = contested(monkeypatch, 1, 1)
    Choices().add(KEY.text, Timed(FUSED, {FUSED: 1.0, UNPACK: 2.0}))
    monkeypatch.setattr(contest, "SHIPPED", {KEY: UNPACK})
    assert used(sides, 128) == ["unpack"] and used(sides, 127) == ["fused"]
    assert sides.clock.asked == 0
    monkeypatch.setattr(contest, "SHIPPED", {})
    next_start(monkeypatch)
    assert used(sides, 128) == ["fused"] and sides.clock.asked == 0


def test_nothing_is_timed_while_a_graph_is_recorded(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides, graph = contested(monkeypatch, 8, 1), recording(monkeypatch)
    assert used(sides, 128) == ["fused"] and sides.clock.asked == 0 and not own_file.exists()
    graph.on = False
    used(sides, 128)
    graph.on = True
    assert used(sides, 128) == ["unpack"] and sides.clock.asked == 1


def test_nothing_is_timed_without_values(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors, with which torch.compile looks at shapes alone, and those of the device meta."""
    sides = contested(monkeypatch, 8, 1)
    weight = random_weight("ternary", "trit5", ROWS, COLUMNS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernels.linear(torch.ones(128, COLUMNS), weight).shape == (128, ROWS)
    kernels.linear(torch.ones(128, COLUMNS, device="meta"), weight.to("meta"))
    assert sides.clock.asked == 0 and not own_file.exists()


def test_nothing_is_timed_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on a device without a timer."""
    sides = contested(monkeypatch, 8, 1)
    for name in ("fused", "unpack"):
        with kernels.use_backend(name):
            assert used(sides, 128) == [name]
    monkeypatch.delitem(contest.timers, "cpu")
    kernels.forget_failures()
    assert used(sides, 128) == ["fused"] and sides.clock.asked == 0


@pytest.mark.parametrize("broken", ["fused", "unpack"])
def test_one_that_breaks_while_it_is_timed(
    broken: str, own_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Is out, said once; the other multiplies, and nothing is kept of a race with one."""
    sides = contested(monkeypatch, 1, 1)
    getattr(sides, broken).error = RuntimeError("no such kernel")
    other = "unpack" if broken == "fused" else "fused"
    assert other in used(sides, 128) and used(sides, 128) == [other]
    assert sides.clock.asked == 0 and not own_file.exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"Bonsai: backend {broken} failed on cpu in mode exact: no such kernel. Going on without it, slower"
    ]


def test_memory_for_the_fused_one_alone(
    own_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It multiplies; the other is no worse for it, and is timed at the next start."""
    sides = contested(monkeypatch, 8, 1)
    sides.unpack.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB")
    assert "fused" in used(sides, 128) and used(sides, 128) == ["fused"]
    assert not own_file.exists() and not caplog.records
    sides.unpack.error = None
    next_start(monkeypatch)
    used(sides, 128)
    assert used(sides, 128) == ["unpack"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "while it is timed"])
def test_a_device_that_is_lost(
    late: bool, own_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sides = contested(monkeypatch, 1, 1)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(calls: Sequence[Callable[[], object]]) -> list[float]:
        raise error

    if late:
        monkeypatch.setitem(contest.timers, "cpu", lost)
    else:
        sides.unpack.error = error
    with pytest.raises(kernels.LostDeviceError, match=r"illegal memory access .*restart it") as found:
        used(sides, 128)
    assert found.value.__cause__ is error and not own_file.exists() and not caplog.records


@pytest.mark.parametrize("answer", [[0.0, 1.0], [1.0, float("nan")], [float("inf"), 1.0]], ids=str)
def test_a_time_that_is_none_is_not_kept(answer: list[float], own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = contested(monkeypatch, 1, 1)
    monkeypatch.setitem(contest.timers, "cpu", lambda calls: answer)
    used(sides, 128)
    assert used(sides, 128) == ["fused"] and not own_file.exists()


GOOD = {"faster": UNPACK, "ms": {FUSED: 2.0, UNPACK: 1.0}}
HEAD = {"format": store.FORMAT, "version": store.VERSION}
DAMAGED = {
    "empty": b"",
    "cut": json.dumps({**HEAD, "choices": {"a": GOOD}}).encode()[:-9],
    "bytes": bytes(range(256)),
    "deep": b"[" * 100_000,
    "infinite": json.dumps({**HEAD, "choices": {"a": {"faster": UNPACK, "ms": {FUSED: 1e999, UNPACK: 1.0}}}}).encode(),
    "long": b" " * (2 << 20),
    "no table": json.dumps({**HEAD, "choices": []}).encode(),
    "side": json.dumps({**HEAD, "choices": {"a": {**GOOD, "faster": "third"}}}).encode(),
    "negative": json.dumps({**HEAD, "choices": {"a": {**GOOD, "ms": {FUSED: -1, UNPACK: 1}}}}).encode(),
    "text": json.dumps({**HEAD, "choices": {"a": {**GOOD, "ms": {FUSED: "1", UNPACK: 1}}}}).encode(),
    "list": json.dumps({**HEAD, "choices": {"a": {**GOOD, "faster": []}}}).encode(),
    "long key": json.dumps({**HEAD, "choices": {"a" * 1000: GOOD}}).encode(),
    "too many": json.dumps({**HEAD, "choices": {str(i): GOOD for i in range(store.MOST_CHOICES + 1)}}).encode(),
}
FOREIGN = {
    "another's": b'{"settings": 1}',
    "a number": b"7",
    "newer": json.dumps({**HEAD, "version": store.VERSION + 1, "choices": {}}).encode(),
    "version in words": json.dumps({**HEAD, "version": "one\n", "choices": {}}).encode(),
}


@pytest.mark.parametrize("content", [*DAMAGED, *FOREIGN])
def test_a_file_that_cannot_be_used(
    content: str, own_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log, and both are timed. A damaged one is replaced, what is not ours stays."""
    own_file.parent.mkdir()
    own_file.write_bytes({**DAMAGED, **FOREIGN}[content])
    sides = contested(monkeypatch, 8, 1)
    for tokens in (128, 600):
        used(sides, tokens)
        assert used(sides, tokens) == ["unpack"]
    assert sides.clock.asked == 2 and len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert str(own_file) in said and said.count(own_file.name) == 1 and "ignored" in said and "\n" not in said
    if content in FOREIGN:
        assert own_file.read_bytes() == FOREIGN[content]
    else:
        assert len(kept(own_file)) == 2


@pytest.mark.parametrize("obstacle", ["a folder", "a file above"])
def test_a_file_that_cannot_be_written(
    obstacle: str, own_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; what was timed holds for this process."""
    if obstacle == "a folder":
        own_file.mkdir(parents=True)
    else:
        own_file.parent.write_bytes(b"")
    sides = contested(monkeypatch, 8, 1)
    for tokens in (128, 600):
        used(sides, tokens)
        assert used(sides, tokens) == ["unpack"]
    assert sides.clock.asked == 2
    assert sum("holds for this run only" in record.getMessage() for record in caplog.records) == 1


def test_what_several_write_at_once_is_all_there(own_file: Path) -> None:
    """Each with a memory of its own, as processes have; locks of files part threads as well."""
    together = threading.Barrier(4)

    def add(number: int) -> None:
        mine = Choices()
        together.wait(30)
        for turn in range(15):
            mine.add(f"{number} {turn}", Timed(FUSED, {FUSED: 1.0, UNPACK: 2.0}))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(kept(own_file)) == {f"{number} {turn}" for number in range(4) for turn in range(15)}


def test_of_two_that_time_the_same_the_first_holds(own_file: Path) -> None:
    first, second = Choices(), Choices()
    assert second.find("a") is None
    assert first.add("a", Timed(UNPACK, {FUSED: 2.0, UNPACK: 1.0})).faster == UNPACK
    assert second.add("a", Timed(FUSED, {FUSED: 1.0, UNPACK: 2.0})).faster == UNPACK
    assert kept(own_file)["a"]["faster"] == UNPACK == second.find("a").faster


def test_the_oldest_go_first(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_CHOICES", 3)
    for key in "abcde":
        Choices().add(key, Timed(FUSED, {FUSED: 1.0, UNPACK: 2.0}))
    assert list(kept(own_file)) == ["c", "d", "e"]


def test_a_full_file_can_be_read_again(own_file: Path) -> None:
    """With keys as long as they can be."""
    mine = Choices()
    mine._known = {f"{i:0{store.KEY_LENGTH}}": Timed(FUSED, {FUSED: 1.2345, UNPACK: 2.3456}) for i in range(1999)}
    mine.add("the last", Timed(FUSED, {FUSED: 1.0, UNPACK: 2.0}))
    assert len(Choices().all()) == 2000


def test_what_is_told(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device, dtype and shapes that are asked for."""
    assert kernels.timed_choices(CPU, torch.float32, {(ROWS, COLUMNS)}) == {}
    contested(monkeypatch, 1, 1)
    assert kernels.timed_choices(CPU, torch.float32, {(ROWS, COLUMNS)}) == {}
    contest.choices.add(KEY.text, Timed(UNPACK, {FUSED: 2.345, UNPACK: 1.0}))
    contest.choices.add("of another version", Timed(UNPACK, {FUSED: 2.0, UNPACK: 1.0}))
    assert kernels.timed_choices(CPU, torch.float32, {(ROWS, COLUMNS), (1, 2)}) == {
        "512 to 256, 512 tokens, trit5 exact": "unpack is faster (fused 2.35 ms, unpack 1 ms)"
    }
    assert kernels.timed_choices(CPU, torch.bfloat16, {(ROWS, COLUMNS)}) == {}
    assert kernels.timed_choices(CPU, torch.float32, {(COLUMNS, ROWS)}) == {}


def test_the_command_forgets(own_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sides = contested(monkeypatch, 8, 1)
    used(sides, 128)
    assert bench.main(["--forget-choices"]) == 0 and not own_file.exists()
    assert f"removed {own_file}" in capsys.readouterr().out
    assert bench.main(["--forget-choices"]) == 0 and "nothing to remove" in capsys.readouterr().out
    next_start(monkeypatch)
    used(sides, 128)
    assert sides.clock.asked == 2


def test_events_of_cuda_in_turns() -> None:
    """The least of rounds that stop once they took long."""
    asked: list[int] = []
    times = {0: iter([3.0, 1.0, 1.1]), 1: iter([2.0, 0.5, 9.0])}

    def once(call: Callable[[], object]) -> float:
        asked.append(number := call())
        return next(times[number])

    assert contest.in_turns([lambda: 0, lambda: 1], once) == [1.0, 0.5]
    assert asked == [0, 1] * 3


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the folder that Triton has its kernels in."""
    assert store.file_path().parent == tmp_path / "cache"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert store.file_path() == tmp_path / ".triton" / "cache" / store.NAME


@pytest.mark.skipif(os.name == "nt", reason="there a user has a home")
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any number: where Triton's own folder is then, and no error."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(RuntimeError):
        Path.home()
    assert store.file_path() == Path("~", ".triton", "cache", store.NAME)
