"""Mutated files against every reader: python -m tests.fuzz [--cases N] [--format F ..] [--seed S] [--first I].

Each case is a valid tiny file or folder of a format, changed in one to three ways, and read in a process with limits
that may have read others before. It has to be read, or refused by our error in one sentence, within 2 seconds of
processor time and 500 MB; nothing is written, run or connected meanwhile. A failed case is printed with the command
that does it again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bonsai_ops.tools.environment import PLUGIN, clean_environment, ensure_or_exit, home, run_attached

INSIDE = "BONSAI_FUZZ"
"""Set in the process of the private environment."""


def main(argv: Sequence[str]) -> int:
    """Runs the cases in the private environment, prints a table and returns the exit code."""
    arguments = _parser().parse_args(argv)
    if not hasattr(os, "fork"):
        raise SystemExit("The fuzzer forks a process for each case, which this system cannot do.")
    if INSIDE in os.environ:
        from .run import run  # which imports torch and ComfyUI

        return run(arguments.format, arguments.cases, arguments.seed, arguments.first, arguments.workers)
    environment = ensure_or_exit(tests=True)
    variables = {
        INSIDE: "1",
        "OMP_NUM_THREADS": "1",  # threads do not survive a fork
        "BONSAI_HOME": str(home()),
        "BONSAI_COMFYUI": os.environ.get("BONSAI_COMFYUI") or str(environment.comfyui),
    }
    return run_attached([str(environment.python), "-m", "tests.fuzz", *argv], clean_environment(variables), PLUGIN)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all formats together (1000)")
    parser.add_argument("--format", nargs="+", default=[], help="only these; an unknown one prints the list")
    parser.add_argument("--seed", default="0", help="any text: other seeds are other cases (0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to do one again (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cases at once (processors)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
