"""A ComfyUI that the user has already."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .pins import NEWEST
from .places import PLUGIN, Environment, SetupError, comfyui_path, comfyui_version, interpreter
from .processes import call_quietly


def find_comfyui_or_exit(chosen: Path | None = None, others: Sequence[Path] = ()) -> Path:
    """A ComfyUI that is there: the chosen one, that of BONSAI_COMFYUI, or the first of several places.

    They are the folder whose custom_nodes the plugin lies in (also by a link that the shell came by), `others`, and the
    private environment. Raises SystemExit.
    """
    named = chosen or os.environ.get("BONSAI_COMFYUI")
    shell = Path(os.environ.get("PWD", ""))
    places = [path.parents[1] for path in (PLUGIN, shell) if len(path.parents) > 1]
    try:
        if named:
            return root_of(Path(named))
        for folder in (*places, *others, comfyui_path(NEWEST)):
            if (folder / "main.py").is_file() and (folder / "comfyui_version.py").is_file():
                return folder.resolve()
    except SetupError as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(
        f"{PLUGIN} lies in no ComfyUI's custom_nodes: name the folder that holds ComfyUI's main.py with --comfyui."
    )


def root_of(folder: Path) -> Path:
    """The folder of main.py; also takes that of the Windows portable build. Raises SetupError."""
    try:
        folder = folder.expanduser().resolve()
        root = next((path for path in (folder, folder / "ComfyUI") if (path / "main.py").is_file()), None)
    except (OSError, RuntimeError) as error:  # too long, no rights, links in a circle, no such user
        said = getattr(error, "strerror", None) or error
        raise SetupError(f"{folder} cannot be used ({said}): name the folder that holds ComfyUI's main.py.") from error
    if root is None:
        raise SetupError(f"{folder} holds no ComfyUI (no main.py): name the folder that holds ComfyUI's main.py.")
    comfyui_version(root)
    return root


def find_own(folder: Path) -> Environment:
    """Find the Python that belongs to an existing ComfyUI; also takes the folder of the Windows portable build."""
    root = root_of(folder)
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
