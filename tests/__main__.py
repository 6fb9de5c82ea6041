"""Run the tests in the private environment with a real ComfyUI: python -m tests [pytest arguments].

BONSAI_COMFYUI names another ComfyUI folder for the tests that import ComfyUI into their own process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bonsai_ops.environment import COMFYUI_VERSIONS, PLUGIN, clean_environment, ensure_or_exit, home, run_attached


def main(argv: Sequence[str]) -> int:
    """Prepare the environment, run pytest with the arguments and return its exit code."""
    environment = ensure_or_exit(tests=True, versions=COMFYUI_VERSIONS)
    variables = clean_environment(
        {
            "BONSAI_HOME": str(home()),
            "BONSAI_COMFYUI": os.environ.get("BONSAI_COMFYUI") or str(environment.comfyui),
        }
    )
    command = [str(environment.python), "-m", "pytest", "--import-mode=importlib", *(argv or ("tests",))]
    return run_attached(command, env=variables, cwd=PLUGIN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
