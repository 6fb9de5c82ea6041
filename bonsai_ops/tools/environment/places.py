"""The folders and names of the private environment."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .pins import NEWEST, TORCH_REQUIREMENTS, TORCHAUDIO_REQUIREMENTS, source_of

PLUGIN = Path(__file__).resolve().parents[3]
PLUGIN_NAME = "bonsai-image"


@dataclass(frozen=True)
class Environment:
    """A Python interpreter that can run ComfyUI, and the ComfyUI folder (the one that holds main.py)."""

    python: Path
    comfyui: Path


class SetupError(RuntimeError):
    """The environment could not be prepared; the message names the cause and the cure."""


def home() -> Path:
    """The folder of the private environment: BONSAI_HOME, else the user's cache folder. It need not exist yet.

    Raises SetupError for a user without a home.
    """
    chosen = os.environ.get("BONSAI_HOME")
    try:
        return Path(chosen).expanduser().resolve() if chosen else _cache()
    except RuntimeError as error:
        raise SetupError(f"This user has no home folder ({error}): name a folder in BONSAI_HOME.") from error


def _cache() -> Path:
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(cache) / PLUGIN_NAME).resolve()


def environment_path() -> Path:
    """The venv for the current Python version and the pinned requirements; it need not exist yet.

    The tools of the tests are not part of the name: they are added to the same venv.
    """
    parts = (
        *TORCH_REQUIREMENTS,
        *TORCHAUDIO_REQUIREMENTS,
        f"comfyui {NEWEST} {source_of(NEWEST).sha256}",
        f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}",
        platform.machine(),
    )
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return home() / f"env-{digest[:12]}"


def comfyui_path(version: str) -> Path:
    """The folder of one ComfyUI version; it exists after `ensure`. Raises ValueError for an unknown version."""
    source_of(version)
    return home() / f"comfyui-{version}"


def newest_packages_path() -> Path:
    """The folder of packages that are newer than those of the venv; it exists after `ensure(tests=True)`."""
    return environment_path() / "newest-packages"


def comfyui_version(comfyui: Path) -> str:
    """The version a ComfyUI folder declares. Raises SetupError when the folder is not a ComfyUI."""
    file = comfyui / "comfyui_version.py"
    found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
    if found is None:
        raise SetupError(
            f"{comfyui} is not a ComfyUI folder (no version in comfyui_version.py): name the folder "
            f"that holds ComfyUI's main.py."
        )
    return found[1]


def interpreter(env: Path) -> Path:
    """The Python of a venv."""
    return env / "Scripts" / "python.exe" if sys.platform == "win32" else env / "bin" / "python"
