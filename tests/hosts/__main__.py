"""What works on which ComfyUI: python -m tests.hosts [--host FOLDER ..] [--only HOST ..] [--parts PART ..] [--all].

Runs the tests that parts.py names for each part on every pinned ComfyUI, on the newest of them with newer packages and
on those that --host names, one process after the other. Prints a Markdown document, docs/hosts.md is one; progress
goes to stderr. The exit code is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from bonsai_ops.tools.environment import (
    COMFYUI_VERSIONS,
    NEWEST,
    SetupError,
    comfyui_path,
    comfyui_version,
    ensure_or_exit,
    newest_packages_path,
)

from .parts import PARTS, REST, REST_TESTS
from .report import document
from .run import Host

WITH_NEWEST_PACKAGES = f"{NEWEST}+"
PINNED = (*COMFYUI_VERSIONS[::-1], WITH_NEWEST_PACKAGES)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all chosen parts on all chosen hosts, prints the table and returns the exit code."""
    arguments = _parser().parse_args(argv)
    environment = ensure_or_exit(tests=True, versions=COMFYUI_VERSIONS)
    parts = {name: PARTS[name] for name in PARTS if name in arguments.parts}
    if arguments.all:
        parts[REST] = REST_TESTS
    hosts = [_pinned(name) for name in PINNED if arguments.only is None or name in arguments.only]
    try:
        hosts += [_other(folder, arguments.packages or newest_packages_path()) for folder in arguments.host]
    except SetupError as error:
        raise SystemExit(str(error)) from None
    columns = []
    for host in hosts:
        print(f"{host.name} ...", end=" ", file=sys.stderr, flush=True)
        columns.append(host.run(parts, environment.python))
        print(f"{columns[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    today = datetime.date.today()
    print(document(columns, list(parts), f"{today.day} {today:%B %Y}"))
    return 0 if all(column.good for column in columns) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__.split("\n")[0])
    parser.add_argument("--host", nargs="+", type=Path, default=[], metavar="FOLDER", help="also these ComfyUIs")
    parser.add_argument(
        "--packages", type=Path, help=f"packages for --host that come first; else those of {WITH_NEWEST_PACKAGES}"
    )
    parser.add_argument("--only", nargs="*", choices=PINNED, help="only these of the pinned hosts; empty: none of them")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these parts")
    parser.add_argument("--all", action="store_true", help=f"one more part: everything else in {' '.join(REST_TESTS)}")
    return parser


def _pinned(name: str) -> Host:
    if name == WITH_NEWEST_PACKAGES:
        return Host(name, comfyui_path(NEWEST), newest_packages_path())
    return Host(name, comfyui_path(name))


def _other(folder: Path, packages: Path) -> Host:
    folder = folder.expanduser().resolve()
    return Host(f"{comfyui_version(folder)}+", folder, packages.expanduser().resolve())


if __name__ == "__main__":
    sys.exit(main())
