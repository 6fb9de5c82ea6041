"""Progress of long work: counted towards a callback (done, total), and the callback that is ComfyUI's bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.utils

Progress = Callable[[int, int], None]
"""progress(done, total) in weights or bytes; what it raises ends the work."""
STEPS = 1000


class Counter:
    """Counts pieces of work towards `progress`, None for nobody."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def begin(self, size: int) -> None:
        """A piece of this size begins."""
        self._tell()
        self._done += size

    def end(self) -> None:
        """All is done, whatever was counted."""
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)


def shares(progress: Progress | None, sizes: Sequence[int]) -> list[Progress]:
    """A callback for each of several pieces of work of these sizes, done in this order: one count of them all.

    It never goes back, whatever a piece counts.
    """
    whole, reached = sum(sizes), 0

    def share(before: int, size: int) -> Progress:
        def move(done: int, total: int) -> None:
            nonlocal reached
            reached = max(reached, before + size * min(done, total) // max(total, 1))
            if progress is not None:
                progress(reached, whole)

        return move

    return [share(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def comfyui_bar() -> Progress:
    """A callback that moves ComfyUI's progress bar and raises when the user cancels."""
    bar: comfy.utils.ProgressBar | None = None

    def move(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        if bar is None:
            bar = comfy.utils.ProgressBar(STEPS)
        bar.update_absolute(done * STEPS // max(total, 1), STEPS)

    return move
