"""Prepare the private environment and print the path of its Python."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .pins import COMFYUI_VERSIONS, NEWEST
from .prepare import ensure_or_exit


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the environment and print the path of its Python."""
    parser = argparse.ArgumentParser(prog="python -m bonsai_ops.tools.environment", description=main.__doc__)
    parser.add_argument("--tests", action="store_true", help="also what the tests need, and every ComfyUI version")
    arguments = parser.parse_args(argv)
    environment = ensure_or_exit(tests=arguments.tests, versions=COMFYUI_VERSIONS if arguments.tests else (NEWEST,))
    print(environment.python)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
