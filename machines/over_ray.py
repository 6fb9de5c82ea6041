"""Pictures from several machines, spread by Ray: python -m machines.over_ray --comfyui /path/to/ComfyUI.

Each actor holds ComfyUI without its server and a whole pack that stays loaded. A prompt whose actor ends before it has
drawn is drawn by another one, and a new actor takes the place of the old. docs/machines.md says what has to lie on each
machine. Nothing of this is needed to run the plugin; Ray is imported when actors are asked for.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

PLUGIN = Path(__file__).resolve().parents[1]
SEEDLING = "bonsai_ops/models/bonsai/seedling"
PROMPTS = (
    "one orange bonsai in a black pot, mist, fallen leaves",
    "two green bonsai trees in blue pots, summer, blue sky",
    "at sunset, a red bonsai tree in a terracotta bowl, grass on the table",
    "a starry night, three little trees with golden foliage in blue pots, snowy",
)
TRIES = 3
"""How often a prompt is given to an actor that ends while it draws, and an actor made that ends while it loads."""
STORE = 80 << 20
"""Bytes of Ray's memory for what actors send, nearly the least that it takes: pictures are smaller."""


@dataclass(frozen=True)
class Task:
    """One picture: number is its place among all, pixels (width, height) multiples of 16."""

    number: int
    prompt: str
    seed: int
    pixels: tuple[int, int] = (128, 128)
    steps: int = 4


@dataclass(frozen=True)
class Place:
    """Where a machine has what it draws with. pack is counted from plugin, options are those of `LoadOptions`."""

    comfyui: str
    plugin: str
    pack: str = SEEDLING
    device: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)


class Painter:
    """One machine's part, without any engine: ComfyUI within this process and the parts of a pack."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.parts: tuple[Any, Any, Any] | None = None

    def load(self) -> int:
        """Loads the pack, once; returns the id of the process. Raises PackError for one that cannot be used."""
        if self.parts is None:
            # Last: ComfyUI's folder, which comes first, has a package `nodes` too.
            sys.path.append(self.place.plugin)
            from bonsai_ops.tools.bench.inside import comfyui

            comfyui.set_up(Path(self.place.comfyui), self.place.device)
            from bonsai_ops.host.pack import load_pack

            self.parts = load_pack(Path(self.place.plugin) / self.place.pack, self.place.options)
        return os.getpid()

    def draw(self, task: Task) -> bytes:
        """The picture as PNG."""
        import torch
        from PIL import Image

        from bonsai_ops.host.sampling import sample_official

        model, clip, vae = self.parts
        width, height = task.pixels
        with torch.inference_mode():
            positive = clip.encode_from_tokens_scheduled(clip.tokenize(task.prompt))
            latent = {"samples": torch.zeros(1, 128, height // 16, width // 16)}
            drawn = sample_official(model, positive, latent, task.seed, task.steps, 1.0)
            values = vae.decode(drawn["samples"])[0].cpu()
        picture = Image.fromarray((values * 255).clamp(0, 255).byte().numpy())
        written = io.BytesIO()
        picture.save(written, "PNG", compress_level=1)
        return written.getvalue()


class Sleeper:
    """Takes the place of a Painter to time what spreading costs: sleeps so many seconds and draws nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def load(self) -> int:
        return os.getpid()

    def draw(self, task: Task) -> bytes:
        time.sleep(self.seconds)
        return str(task).encode()


class Board:
    """Which tasks wait, which actor has which, and what came of them; of actors it knows only names.

    pictures: {number: PNG}. failed: {number: why}. lost: tasks that were given again.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.waiting = deque(tasks)
        self.given: dict[str, Task] = {}
        self.pictures: dict[int, bytes] = {}
        self.failed: dict[int, str] = {}
        self.lost = 0
        self._ended: Counter[int] = Counter()

    @property
    def open(self) -> bool:
        """Whether something waits or is being drawn."""
        return bool(self.waiting or self.given)

    def take(self, actor: str) -> Task | None:
        """The next task, which that actor has from now on; None if none waits."""
        if not self.waiting:
            return None
        self.given[actor] = self.waiting.popleft()
        return self.given[actor]

    def drawn(self, actor: str, picture: bytes) -> None:
        self.pictures[self.given.pop(actor).number] = picture

    def refused(self, actor: str, why: str) -> None:
        """The task cannot be drawn, by nobody: it is not given again."""
        self.failed[self.given.pop(actor).number] = why

    def ended(self, actor: str) -> None:
        """The actor is gone. What it had comes first again, unless it has ended TRIES actors."""
        task = self.given.pop(actor, None)
        if task is None:
            return
        self._ended[task.number] += 1
        if self._ended[task.number] < TRIES:
            self.lost += 1
            self.waiting.appendleft(task)
        else:
            self.failed[task.number] = f"{TRIES} actors ended while they drew it"

    def give_up(self, why: str) -> None:
        """Nobody is left who draws."""
        for task in [*self.given.values(), *self.waiting]:
            self.failed[task.number] = why
        self.given.clear()
        self.waiting.clear()


class Crew:
    """Actors of Ray that draw. make() gives a new one: a handle with `load` and `draw`.

    actors: {name: handle}, processes: {name: id of its process}. why: what ended those that are not replaced any more.
    """

    def __init__(self, ray: ModuleType, make: Callable[[], Any], count: int) -> None:
        self.ray, self.make = ray, make
        self.actors: dict[str, Any] = {f"actor {i}": make() for i in range(count)}
        self.processes: dict[str, int] = {}
        self.why = ""
        self._ended: Counter[str] = Counter()
        self._running: dict[Any, str] = {actor.load.remote(): name for name, actor in self.actors.items()}

    def wait(self) -> None:
        """Until all have loaded. Raises RuntimeError if none could."""
        while self._running:
            self._next(Board(()))
        if not self.actors:
            raise RuntimeError(f"no actor could load the pack: {self.why}")

    def draw(self, tasks: Iterable[Task], hands: int, watch: Callable[[Board], None] = lambda board: None) -> Board:
        """Draws the tasks with so many of the actors, at least one; watch is called before each wait."""
        board = Board(tasks)
        while board.open:
            for name in list(self.actors)[:hands]:
                if name not in self._running.values() and (task := board.take(name)):
                    self._running[self.actors[name].draw.remote(task)] = name
            if not self.actors:
                board.give_up(f"no actor is left: {self.why}")
            else:
                watch(board)
                self._next(board)
        return board

    def _next(self, board: Board) -> None:
        """Waits for one answer, of whichever actor, and takes note of it."""
        (done,), _ = self.ray.wait(list(self._running), num_returns=1)
        name = self._running.pop(done)
        try:
            answer = self.ray.get(done)
        except self.ray.exceptions.RayActorError as error:
            board.ended(name)
            self._replace(name, error)
        except self.ray.exceptions.RayTaskError as error:
            why = f"{type(error.cause).__name__}: {error.cause}"
            if name in board.given:
                board.refused(name, why)
            else:  # it could not load, and would not the next time
                self._leave(name, why)
        else:
            if name in board.given:
                board.drawn(name, answer)
            else:
                self._ended[name] = 0
                self.processes[name] = answer

    def _replace(self, name: str, error: Exception) -> None:
        self._ended[name] += 1
        if self._ended[name] > TRIES:
            self._leave(name, str(error).splitlines()[0])
            return
        if not isinstance(error, self.ray.exceptions.ActorUnavailableError):
            self.actors[name] = self.make()
        self._running[self.actors[name].load.remote()] = name

    def _leave(self, name: str, why: str) -> None:
        del self.actors[name]
        self.why = why


def connected(address: str | None, count: int, cpus: int, gpus: int) -> ModuleType:
    """Ray, connected to a cluster, or started on this machine alone.

    Raises SystemExit if it is not installed, or has not what so many actors need.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise SystemExit("This example needs Ray in the Python of ComfyUI: pip install ray") from None
    # By value: a machine of the cluster need not have this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(num_cpus=count * cpus, include_dashboard=False, object_store_memory=STORE, log_to_driver=False)
    has = ray.cluster_resources()
    if has.get("CPU", 0) < count * cpus or has.get("GPU", 0) < count * gpus:
        ray.shutdown()
        raise SystemExit(f"Too many actors: Ray has {has.get('CPU', 0):.0f} processors, {has.get('GPU', 0):.0f} GPUs.")
    return ray


def maker(ray: ModuleType, kind: type, what: Any, cpus: int, gpus: int) -> Callable[[], Any]:
    """A function that makes an actor around kind(what), which Ray lets compute on so many threads."""
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(kind)
    return lambda: actor.remote(what)


class Killer:
    """A watcher that ends one actor's process while it draws, once: kill -9, on this machine only."""

    def __init__(self, crew: Crew) -> None:
        self.crew, self.name, self.process = crew, "", 0

    def __call__(self, board: Board) -> None:
        if not self.name and board.pictures and board.given:
            self.name = next(iter(board.given))
            self.process = self.crew.processes[self.name]
            os.kill(self.process, 9)

    def told(self) -> str:
        """What became of it, when the others have loaded."""
        self.crew.wait()
        new = self.name in self.crew.actors and self.crew.processes[self.name] != self.process
        return f"The process of {self.name} was ended while it drew; {'a new one' if new else 'none'} took its place."


def read(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def tasks(prompts: Sequence[str], pictures: int, seed: int, pixels: tuple[int, int]) -> Iterator[Task]:
    """So many tasks: the prompts in turn, each picture with a seed of its own."""
    for number in range(pictures):
        yield Task(number, prompts[number % len(prompts)], seed + number, pixels)


def line(hands: int, board: Board, seconds: float) -> str:
    """What a run gave, in words."""
    count = len(board.pictures)
    again = f", {board.lost} given again" if board.lost else ""
    return f"{hands} of the actors: {count} pictures in {seconds:.1f} s, {count / seconds * 3600:.0f} an hour{again}."


def main(argv: Sequence[str] | None = None) -> int:
    """Draws; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m machines.over_ray", description=__doc__.split("\n\n")[0])
    parser.add_argument("--comfyui", help="ComfyUI's folder, the same on each machine")
    parser.add_argument("--plugin", default=str(PLUGIN), help="this plugin's folder, the same on each machine")
    parser.add_argument("--pack", default=SEEDLING, help="a pack's folder, from the plugin's (the seedling)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where each actor computes (cpu)")
    parser.add_argument("--address", help="of a running cluster, or auto; without it Ray starts on this machine")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2], help="how many draw, run after run (1 2)")
    parser.add_argument("--cpus", type=int, default=1, help="processors of each actor (1)")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt a line (four for the seedling)")
    parser.add_argument("--pictures", type=int, default=8, help="how many in each run (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, the next has one more (0)")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], help="width and height in pixels (128 128)")
    parser.add_argument("--kill", action="store_true", help="end a process during the last run, to see it replaced")
    parser.add_argument("--sleep", type=float, help="time spreading alone: sleep so many seconds for each picture")
    parser.add_argument("--out", type=Path, help="folder for the pictures of the first run")
    arguments = parser.parse_args(argv)
    prompts = read(arguments.prompts) if arguments.prompts else PROMPTS
    wanted = list(tasks(prompts, arguments.pictures, arguments.seed, tuple(arguments.size))) if prompts else []
    if arguments.sleep is None and not arguments.comfyui:
        parser.error("--comfyui is needed, ComfyUI's folder")
    if min(arguments.actors) < 1 or not wanted:
        parser.error("at least one actor, one picture and one prompt are needed")
    count = max(arguments.actors)
    gpus = int(arguments.device == "gpu")
    ray = connected(arguments.address, count, arguments.cpus, gpus)
    try:
        place = Place(arguments.comfyui, arguments.plugin, arguments.pack, arguments.device)
        what = (Painter, place) if arguments.sleep is None else (Sleeper, arguments.sleep)
        started = time.perf_counter()
        crew = Crew(ray, maker(ray, *what, arguments.cpus, gpus), count)
        crew.wait()
        print(f"{len(crew.actors)} actors loaded in {time.perf_counter() - started:.1f} s.", flush=True)
        return runs(crew, wanted, arguments.actors, arguments.kill, arguments.out)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        ray.shutdown()


def runs(crew: Crew, wanted: Sequence[Task], actors: Sequence[int], kill: bool, out: Path | None) -> int:
    """The same tasks with each number of actors; returns the exit code: 1 if a picture is missing or differs."""
    first: dict[int, bytes] = {}
    wrong = 0
    for turn, hands in enumerate(actors):
        last = turn == len(actors) - 1
        started = time.perf_counter()
        watch = Killer(crew) if kill and last else None
        board = crew.draw(wanted, hands, watch or (lambda board: None))
        print(line(hands, board, time.perf_counter() - started), flush=True)
        if watch and watch.name:
            print(watch.told(), flush=True)
        first = first or board.pictures
        different = [number for number, picture in board.pictures.items() if first.get(number) != picture]
        for number, why in sorted(board.failed.items()):
            print(f"picture {number}: {why}", file=sys.stderr)
        for number in different:
            print(f"picture {number} differs from the first run's", file=sys.stderr)
        wrong += len(board.failed) + len(different)
    if not wrong:
        print("The same seeds gave the same pictures, to the bit, in every run.")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in first.items():
            (out / f"{number:04}.png").write_bytes(picture)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
