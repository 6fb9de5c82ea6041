"""Each kind of prompt of python -m tests.soak twice, on the server of the other tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from soak import GRAPHS, REFUSED, Soak, written

from bonsai_ops.tools.server import ComfyServer

pytestmark = [pytest.mark.host, pytest.mark.slow]


def test_every_kind_is_answered_and_drawn_again_to_the_bit(comfy_server: Callable[..., ComfyServer]) -> None:
    server = comfy_server()
    run = Soak(64, 1, tuple(GRAPHS), seeds=1)
    with written(server.base_directory):
        run.run(server, 2 * len(GRAPHS))
    assert run.faults() == []
    assert run.answered == dict.fromkeys(GRAPHS, 2)
    assert run.same_again >= len(set(GRAPHS) - set(REFUSED) - {"cancel"})
