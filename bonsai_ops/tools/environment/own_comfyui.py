"""A ComfyUI that the user has already."""

from __future__ import annotations

import sys
from pathlib import Path

from .places import Environment, SetupError, comfyui_version, interpreter
from .processes import call_quietly


def find_own(folder: Path) -> Environment:
    """Find the Python that belongs to an existing ComfyUI; also takes the folder of the Windows portable build."""
    folder = folder.expanduser().resolve()
    root = next((path for path in (folder, folder / "ComfyUI") if (path / "main.py").is_file()), None)
    if root is None:
        raise SetupError(f"{folder} holds no ComfyUI (no main.py): name the folder that holds ComfyUI's main.py.")
    comfyui_version(root)
    candidates = [interpreter(place / name) for place in (root, root.parent) for name in ("venv", ".venv")]
    candidates += [place / "python_embeded" / "python.exe" for place in (root.parent, root)]
    candidates.append(Path(sys.executable))
    for python in candidates:
        if python.is_file() and _has_torch(python):
            return Environment(python, root)
    raise SetupError(
        f"No Python with torch was found for {root} (looked for venv, .venv and python_embeded beside "
        f"it): run this command with the Python that runs your ComfyUI."
    )


def _has_torch(python: Path) -> bool:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return call_quietly([str(python), "-c", probe]) == 0
