"""Tests in Triton's interpreter, which must be chosen before Triton is imported and would confuse other tests.

test_triton.py starts a child with TRITON_INTERPRET=1 for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is that child."""


def interpreter(test: Callable) -> Callable | None:
    """The test in the child, nothing to collect elsewhere."""
    return test if INTERPRETED else None


def once(test: Callable) -> Callable | None:
    """The test outside of the child: what it checks is the same in there."""
    return None if INTERPRETED else test
