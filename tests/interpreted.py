"""Tests in Triton's interpreter, which must be chosen before Triton is imported and would confuse other tests.

test_triton.py starts a child with TRITON_INTERPRET=1 for them.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is that child."""


def interpreter(test: Callable) -> Callable | None:
    """The test in the child, nothing to collect elsewhere."""
    return test if INTERPRETED else None


def once(test: Callable) -> Callable | None:
    """The test outside of the child: what it checks is the same in there."""
    return None if INTERPRETED else test


def _patch_once_a_launch() -> None:
    """Triton's interpreter puts its functions into triton.language when a kernel is launched, and then again at each
    call of a function within it, by a look at all names there. That changes nothing and takes two fifths of its time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @functools.cache
    def modules(function: Callable) -> frozenset[str]:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(value.__name__ for value in seen if value in (language, language.core))

    def patch_new(function: Callable) -> Any:
        if modules(function) <= patched:
            return SimpleNamespace(restore=lambda: None)
        patched.update(modules(function))
        return patch(function)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch_anew


if INTERPRETED:
    _patch_once_a_launch()
