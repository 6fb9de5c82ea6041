"""What the programs for several machines decide themselves; tests/host/test_machines.py runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from machines import over_distributed
from machines.over_ray import TRIES, Board, Crew, Task, read, tasks

REPOSITORY = Path(__file__).resolve().parents[2]
TWO = list(tasks(["a", "b"], 2, 5, (128, 128)))


# The board


def test_each_task_is_drawn_once() -> None:
    board = Board(TWO)
    assert [board.take("x").prompt, board.take("y").prompt, board.take("z")] == ["a", "b", None]
    board.drawn("y", b"2")
    assert board.open
    board.drawn("x", b"1")
    assert not board.open and board.pictures == {0: b"1", 1: b"2"} and not board.failed and not board.lost


def test_a_task_whose_actor_ended_comes_first_again() -> None:
    board = Board(TWO)
    board.take("x")
    board.ended("x")
    assert board.lost == 1 and board.take("y").number == 0
    board.ended("z")  # it had nothing
    assert board.lost == 1


def test_a_task_that_ends_every_actor_is_given_up() -> None:
    board = Board(TWO[:1])
    for _ in range(TRIES):
        board.take("x")
        board.ended("x")
    assert not board.open and list(board.failed) == [0] and "3 actors ended" in board.failed[0]


def test_what_cannot_be_drawn_is_not_tried_again() -> None:
    board = Board(TWO)
    board.take("x")
    board.refused("x", "PackError: why")
    board.give_up("nobody is left")
    assert not board.open and board.failed == {0: "PackError: why", 1: "nobody is left"}


def test_each_picture_has_its_own_seed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\n b\n", encoding="utf-8")
    made = list(tasks(read(tmp_path / "prompts.txt"), 3, 5, (64, 128)))
    assert made == [Task(0, "a", 5, (64, 128)), Task(1, " b", 6, (64, 128)), Task(2, "a", 7, (64, 128))]


# The crew. The engine's part is what raises and in which order; the host test has the real one.


class DiedError(Exception):
    """As Ray's RayActorError."""


class UnavailableError(DiedError):
    """As Ray's ActorUnavailableError."""


class FailedError(Exception):
    """As Ray's RayTaskError."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback")
        self.cause = cause


class Engine:
    """Answers calls in their order. script: for each actor that is made, what its calls raise, None if nothing."""

    exceptions = SimpleNamespace(
        RayActorError=DiedError, ActorUnavailableError=UnavailableError, RayTaskError=FailedError
    )

    def __init__(self, *script: list[Exception | None]) -> None:
        self.script, self.made = list(script), 0

    def make(self) -> Any:
        raises = self.script.pop(0) if self.script else []
        self.made += 1

        def call(*tasks: Task) -> SimpleNamespace:
            return Call(raises.pop(0) if raises else None, tasks[0].prompt.encode() if tasks else self.made)

        return SimpleNamespace(load=SimpleNamespace(remote=call), draw=SimpleNamespace(remote=call))

    def wait(self, calls: list[Call], num_returns: int) -> tuple[list[Call], list[Call]]:
        return calls[:num_returns], calls[num_returns:]

    def get(self, call: Call) -> Any:
        if call.error is not None:
            raise call.error
        return call.value


class Call:
    def __init__(self, error: Exception | None, value: Any) -> None:
        self.error, self.value = error, value


def drawn(engine: Engine, count: int = 1, hands: int = 1) -> tuple[Crew, Board]:
    crew = Crew(engine, engine.make, count)
    crew.wait()
    return crew, crew.draw(TWO, hands)


@pytest.mark.parametrize(("error", "made"), [(DiedError("killed"), 2), (UnavailableError("no answer"), 1)])
def test_an_actor_that_ends_is_replaced(error: Exception, made: int) -> None:
    """One that does not answer is asked to load again: Ray may reach it later, or says then that it died."""
    engine = Engine([None, error])
    crew, board = drawn(engine)
    assert board.pictures == {0: b"a", 1: b"b"} and board.lost == 1 and not board.failed
    assert engine.made == made and list(crew.actors) == ["actor 0"]


def test_more_actors_than_hands_wait() -> None:
    crew, board = drawn(Engine(), count=3, hands=2)
    assert len(board.pictures) == 2 and len(crew.actors) == len(crew.processes) == 3


def test_a_refused_task_does_not_end_its_actor() -> None:
    _, board = drawn(Engine([None, FailedError(ValueError("the latent has shape"))]))
    assert board.failed == {0: "ValueError: the latent has shape"} and board.pictures == {1: b"b"}


def test_an_actor_that_cannot_load_leaves_the_others() -> None:
    engine = Engine([FailedError(ValueError("no such pack"))], [None])
    crew, board = drawn(engine, count=2, hands=2)
    assert len(board.pictures) == 2 and list(crew.actors) == ["actor 1"] and engine.made == 2


def test_nobody_can_load() -> None:
    engine = Engine([FailedError(ValueError("no such pack"))])
    with pytest.raises(RuntimeError, match="no actor could load the pack: ValueError: no such pack"):
        drawn(engine)


def test_actors_that_end_while_they_load_are_not_made_for_ever() -> None:
    engine = Engine(*([DiedError("out of memory\nmore lines")] for _ in range(20)))
    with pytest.raises(RuntimeError, match=r"out of memory$"):
        drawn(engine)
    assert engine.made == TRIES + 1


def test_tasks_are_told_when_the_last_actor_is_gone() -> None:
    engine = Engine([None, DiedError("killed")], *([DiedError("out of memory")] for _ in range(20)))
    _, board = drawn(engine)
    assert set(board.failed) == {0, 1} and "no actor is left: out of memory" in board.failed[1]


# The commands


def test_ray_is_asked_for_in_a_sentence(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from machines.over_ray import main; main(['--comfyui', '.'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr == "This example needs Ray in the Python of ComfyUI: pip install ray\n"


def test_a_graph_is_led_through_the_two_nodes() -> None:
    graph = {
        "7": {"class_type": "BonsaiSampler", "inputs": {"seed": 3, "steps": 4, "model": ["1", 0]}},
        "8": {"class_type": "RandomNoise", "inputs": {"noise_seed": 4}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}},
    }
    before = json.dumps(graph)
    made = over_distributed.spread(graph)
    assert json.dumps(graph) == before and {*graph} < {*made} and len(made) == 6
    for number, name, seed in (("7", "seed", 3), ("8", "noise_seed", 4)):
        node = made[made[number]["inputs"][name][0]]
        assert node == {"class_type": "DistributedSeed", "inputs": {"seed": seed}}
    collector = made[made["9"]["inputs"]["images"][0]]
    assert collector["class_type"] == "DistributedCollector" and collector["inputs"]["images"] == ["7", 0]


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ({"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}}}, "as its seed"),
        ({"1": {"class_type": "BonsaiSampler", "inputs": {"seed": 3}}}, "add Save Image"),
        ({"1": {"class_type": "BonsaiSampler", "inputs": {"seed": ["2", 0]}}}, "as its seed"),
    ],
)
def test_a_graph_that_cannot_be_spread(graph: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        over_distributed.spread(graph)


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "graph.json").write_text("{}", encoding="utf-8")
    assert over_distributed.main([str(tmp_path / "graph.json"), "--server", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9/distributed/config does not answer" in capsys.readouterr().err


def test_no_folder_hides_the_templates() -> None:
    """ComfyUI looks into these of every plugin, in this order, and serves files of the first that there is."""
    looked_into = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in looked_into if (REPOSITORY / name).exists()] == ["workflows"]
