"""This plugin as a custom node of a ComfyUI."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .places import PLUGIN, PLUGIN_NAME


def link_plugin(base_directory: Path) -> Path:
    """Make this plugin a custom node of the ComfyUI base directory and return the new path.

    A symbolic link, on Windows a junction; where neither is possible a copy, which is renewed at each call. Raises
    FileExistsError when something else has the name.
    """
    link = base_directory / "custom_nodes" / PLUGIN_NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    marker = link / ".bonsai-copy"
    if marker.is_file():
        shutil.rmtree(link)
    elif os.path.lexists(link):
        if os.path.realpath(link) == os.path.realpath(PLUGIN):
            return link
        _remove_link(link)
    try:
        if sys.platform == "win32":
            import _winapi

            _winapi.CreateJunction(str(PLUGIN), str(link))
        else:
            link.symlink_to(PLUGIN, target_is_directory=True)
    except (OSError, NotImplementedError):
        shutil.copytree(PLUGIN, link, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "build"))
        marker.touch()
    return link


def _remove_link(link: Path) -> None:
    """Remove a link or junction. Raises FileExistsError for a real file or folder."""
    try:
        os.readlink(link)
    except OSError:
        raise FileExistsError(f"{link} is not a link made by this plugin: move it away and run again.") from None
    try:
        link.unlink()
    except OSError:  # a junction is removed like a folder
        link.rmdir()
