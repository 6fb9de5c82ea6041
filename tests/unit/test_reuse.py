"""Memory that is used again: never two living tensors on one piece, nothing kept that nobody needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from bonsai_ops.kernels.reuse import IDLE_TURNS, LEAST_BYTES, Reuse

ROWS, COLUMNS = 64, LEAST_BYTES // 64
"""Of a uint8 tensor that is just large enough."""


@pytest.fixture
def reuse() -> Iterator[Reuse]:
    found = Reuse()
    with found.opened():
        yield found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_an_ordinary_tensor(reuse: Reuse, dtype: torch.dtype, inference: bool) -> None:
    with torch.inference_mode(inference):
        tensor = reuse.empty(ROWS, COLUMNS, dtype)
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((ROWS, COLUMNS), dtype, "cpu")
        assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
        tensor.fill_(3).add_(1)
        assert int(tensor.max()) == int(tensor.min()) == 4
        assert tensor.clone().is_inference() == inference


def test_living_tensors_share_nothing(reuse: Reuse) -> None:
    tensors = [reuse.empty(ROWS, COLUMNS, torch.uint8).fill_(i) for i in range(5)]
    assert [int(t.min()) for t in tensors] == [int(t.max()) for t in tensors] == list(range(5))
    assert reuse.nbytes == 5 * LEAST_BYTES


def test_a_dead_tensor_leaves_its_memory_to_the_next(reuse: Reuse) -> None:
    first = reuse.empty(ROWS, COLUMNS, torch.uint8)
    place = first.data_ptr()
    del first
    assert reuse.empty(ROWS, COLUMNS, torch.uint8).data_ptr() == place
    assert reuse.nbytes == LEAST_BYTES


@pytest.mark.parametrize(
    "holder",
    [
        lambda t: t[3:5],
        lambda t: t.view(torch.int32).t(),
        lambda t: t.untyped_storage(),
        lambda t: t.numpy()[:1],
        lambda t: torch.utils.dlpack.from_dlpack(t),
        lambda t: t.split(7, 1)[2].unsqueeze(0),
    ],
    ids=["slice", "view", "storage", "numpy", "dlpack", "split"],
)
def test_whatever_still_sees_the_memory_keeps_it(reuse: Reuse, holder) -> None:
    first = reuse.empty(ROWS, COLUMNS, torch.uint8)
    place, held = first.data_ptr(), holder(first)
    del first
    second = reuse.empty(ROWS, COLUMNS, torch.uint8)
    assert second.data_ptr() != place
    places = {place, second.data_ptr()}
    del second, held
    assert {reuse.empty(ROWS, COLUMNS, torch.uint8).data_ptr() for _ in range(3)} <= places
    assert reuse.nbytes == 2 * LEAST_BYTES


def test_the_best_fit_and_no_great_waste(reuse: Reuse) -> None:
    large, middle = (reuse.empty(ROWS, n * COLUMNS, torch.uint8) for n in (6, 3))
    places = large.data_ptr(), middle.data_ptr()
    del large, middle
    found = reuse.empty(ROWS, 3 * COLUMNS - 64, torch.uint8)
    assert found.data_ptr() == places[1]
    small = reuse.empty(ROWS, COLUMNS, torch.uint8)
    assert small.data_ptr() not in places
    assert reuse.nbytes == (6 + 3 + 1) * LEAST_BYTES


def test_idle_memory_is_given_back(reuse: Reuse) -> None:
    kept = reuse.empty(ROWS, COLUMNS, torch.uint8)
    reuse.empty(ROWS, 2 * COLUMNS, torch.uint8)
    for _ in range(IDLE_TURNS):
        reuse.next_turn()
    assert reuse.nbytes == 3 * LEAST_BYTES
    reuse.next_turn()
    assert reuse.nbytes == LEAST_BYTES
    kept.fill_(1)


class User:
    """Whoever has memory kept."""


def test_closed_it_keeps_nothing() -> None:
    reuse, user = Reuse(), User()
    reuse.open(user)
    used = reuse.empty(ROWS, COLUMNS, torch.uint8).fill_(7)
    reuse.empty(ROWS, COLUMNS, torch.uint8)
    assert reuse.nbytes == 2 * LEAST_BYTES
    reuse.close(user)
    assert reuse.nbytes == 0
    other = reuse.empty(ROWS, COLUMNS, torch.uint8).fill_(8)
    assert (reuse.nbytes, int(used.min()), int(other.min())) == (0, 7, 8)


def test_it_stays_open_for_those_who_have_not_closed() -> None:
    reuse, (one, other) = Reuse(), (User(), User())
    for user in (one, one, other):
        reuse.open(user)
    for user in (other, other, one):
        reuse.close(user)
        reuse.empty(ROWS, COLUMNS, torch.uint8)
        assert reuse.nbytes == LEAST_BYTES
    reuse.close(one)
    assert reuse.nbytes == 0
    reuse.empty(ROWS, COLUMNS, torch.uint8)
    assert reuse.nbytes == 0


def test_it_does_not_stay_open_for_those_who_are_gone() -> None:
    reuse, user = Reuse(), User()
    reuse.open(user)
    reuse.empty(ROWS, COLUMNS, torch.uint8)
    del user
    reuse.empty(ROWS, 3 * COLUMNS, torch.uint8)
    assert reuse.nbytes == LEAST_BYTES
    with reuse.opened():
        pass
    assert reuse.nbytes == 0


def test_small_tensors_are_not_kept(reuse: Reuse) -> None:
    assert reuse.empty(ROWS, COLUMNS - 1, torch.uint8).shape == (ROWS, COLUMNS - 1)
    assert reuse.empty(0, COLUMNS, torch.uint8).numel() == 0
    assert reuse.nbytes == 0


def test_several_threads(reuse: Reuse) -> None:
    """Each writes its own number and reads it back, many times."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            reuse.next_turn()
            tensor = reuse.empty(ROWS, COLUMNS, torch.uint8).fill_(number)
            wrong.extend([number] * (int(tensor.min()) != number or int(tensor.max()) != number))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= reuse.nbytes // LEAST_BYTES <= 8
