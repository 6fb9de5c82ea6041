"""Run the tests in the private environment with a real ComfyUI: python -m tests [pytest arguments].

The whole suite, that is without the name of a test among the arguments, runs in several processes (-n 0: in one). With
CI=true a test that is skipped without need fails it.
BONSAI_COMFYUI names another ComfyUI folder for the tests that import ComfyUI into their own process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from bonsai_ops.tools.environment import (
    COMFYUI_VERSIONS,
    PLUGIN,
    SetupError,
    clean_environment,
    ensure_or_exit,
    home,
    run_attached,
)

SIZES = """The environment{} takes about 7 GB and is prepared once, in some minutes; BONSAI_HOME names another place.
pytest's own options: python -m pytest --help in that environment."""
MOST_WORKERS = 4
"""Each may hold a few GB: ComfyUI servers and packs."""
ONE_PROCESS = ("-n", "--numprocesses", "--pdb", "--trace", "--co")
"""Beginnings of options that choose the number of processes, or do not go with several."""


def main(argv: Sequence[str]) -> int:
    """Prepare the environment, run pytest with the arguments and return its exit code."""
    if {"-h", "--help"} & set(argv):
        place = ""
        with contextlib.suppress(SetupError):  # a user without a home folder
            place = f" in {home()}"
        print(f"usage: python -m tests [pytest arguments]\n\n{__doc__}\n{SIZES.format(place)}")
        return 0
    environment = ensure_or_exit(tests=True, versions=COMFYUI_VERSIONS)
    whole = all(argument.startswith("-") and not argument.startswith(ONE_PROCESS) for argument in argv)
    processors = os.cpu_count() or 1
    workers = min(MOST_WORKERS, processors) if whole else 1
    variables = clean_environment(
        {
            # torch's threads of several processes on one processor wait for each other
            "PYTHONDONTWRITEBYTECODE": "",  # dozens of processes would each compile ComfyUI anew
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(processors // workers),
            "BONSAI_HOME": str(home()),
            "BONSAI_COMFYUI": os.environ.get("BONSAI_COMFYUI") or str(environment.comfyui),
        }
    )
    command = [str(environment.python), "-m", "pytest", "--no-loadscope-reorder"]
    command += [f"-n{workers}"] if workers > 1 else []
    command += ["--no-skips"] if whole and os.environ.get("CI") == "true" else []
    command += [*argv, "tests"] if whole else argv
    return run_attached(command, env=variables, cwd=PLUGIN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
