"""Prepares the private environment, or finds the user's own, and runs modules in it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from .comfyui_download import comfyui_requirements, comfyui_step
from .lock import hold_lock
from .locks import locked
from .own_comfyui import find_own
from .pins import (
    MANAGER_REQUIREMENTS,
    NEWEST,
    NEWEST_PACKAGES,
    TEST_REQUIREMENTS,
    TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES,
    TORCH_REQUIREMENTS,
    TORCHAUDIO_REQUIREMENTS,
    source_of,
)
from .places import (
    Environment,
    SetupError,
    comfyui_path,
    environment_path,
    home,
    interpreter,
    newest_packages_path,
)
from .processes import clean_environment, ending_by_exception, module_command, run_attached, say
from .steps import Step, folder_step, perform, pip_step, venv_step

MINIMUM_PYTHON = (3, 10)
COSTS = "downloads about 3 GB from the Python package index, takes 7 GB of disk and some minutes"
_RELAUNCHED = "BONSAI_RELAUNCHED"


def ensure(tests: bool = False, comfyui: Path | None = None, versions: Sequence[str] = (NEWEST,)) -> Environment:
    """Prepare the private environment and return it; the first of `versions` becomes `Environment.comfyui`.

    tests adds what the test suite imports. With `comfyui`, the user's own ComfyUI folder, nothing is installed: its
    Python is looked up and returned. Progress goes to stderr. Raises SetupError.
    """
    if comfyui is not None:
        return find_own(comfyui)
    if sys.version_info < MINIMUM_PYTHON:
        raise SetupError(f"Python {platform.python_version()} is too old: run this with Python 3.10 or newer.")
    wanted = tuple(dict.fromkeys(versions)) or (NEWEST,)
    for version in wanted:
        source_of(version)
    try:
        home().mkdir(parents=True, exist_ok=True)
        environment = Environment(interpreter(environment_path()), comfyui_path(wanted[0]))
        steps = _steps(tests, wanted)
        if all(step.is_done() for step in steps):
            return environment
        with hold_lock(home() / "lock"):
            say(f"Preparing {environment_path()}: {COSTS}")
            _mention_old_environments()
            for number, step in enumerate(steps, start=1):
                perform(step, f"[{number}/{len(steps)}] {step.title}")
    except OSError as error:
        raise SetupError(
            f"Writing to {home()} failed ({error}): free some space (7 GB are needed) or name another "
            f"folder in the environment variable BONSAI_HOME."
        ) from error
    return environment


def ensure_or_exit(
    tests: bool = False, comfyui: Path | None = None, versions: Sequence[str] = (NEWEST,)
) -> Environment:
    """`ensure` for command-line entries: ends the program with a message instead of a SetupError or an interrupt.

    A signal that ends the program ends pip too, and gives the lock back.
    """
    try:
        with ending_by_exception():
            return ensure(tests, comfyui, versions)
    except SetupError as error:
        raise SystemExit(str(error)) from None
    except (KeyboardInterrupt, SystemExit) as end:
        say("Stopped. Run the same command again to go on from here.")
        raise SystemExit(130 if isinstance(end, KeyboardInterrupt) else end.code) from None


def relaunch_if_needed(module: str, argv: Sequence[str], yes: bool = False) -> None:
    """Return if this Python has what the package imports; else run `module` with `argv` in the private environment.

    In that case the function ends with SystemExit and the exit code of that run. It is meant as the first line of a
    command-line entry: `relaunch_if_needed("bonsai_ops.convert", sys.argv[1:])`. Where the environment is not there
    yet, it says what that costs and asks, unless `yes`.
    """
    missing = _missing()
    if not missing:
        return
    if os.environ.get(_RELAUNCHED):
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}: delete {environment_path()} and run again.")
    try:
        place, ready = home(), all(step.is_done() for step in _steps(False, (NEWEST,)))
    except SetupError as error:
        raise SystemExit(str(error)) from None
    say(f"This Python ({sys.executable}) has no {', '.join(missing)}: using the private environment in {place}.")
    if not yes and not ready:
        _ask(module)
    _relaunch(ensure_or_exit().python, module, argv)


def relaunch_in_own(module: str, argv: Sequence[str], comfyui: Path) -> None:
    """As `relaunch_if_needed`, in the Python that belongs to this ComfyUI; nothing is installed."""
    missing = _missing()
    if not missing:
        return
    try:
        python = find_own(comfyui).python
    except SetupError as error:
        raise SystemExit(str(error)) from None
    if os.environ.get(_RELAUNCHED):
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}: run this with the Python of your ComfyUI.")
    say(f"This Python has no {', '.join(missing)}: using {python}.")
    _relaunch(python, module, argv)


def _missing() -> list[str]:
    return [name for name in ("torch", "numpy", "safetensors") if importlib.util.find_spec(name) is None]


def _relaunch(python: Path, module: str, argv: Sequence[str]) -> None:
    raise SystemExit(run_attached([*module_command(module, python), *argv], env=clean_environment({_RELAUNCHED: "1"})))


def _ask(module: str) -> None:
    """Returns if the user agrees to prepare the environment; else ends with SystemExit."""
    say(f"It is not there yet, or not complete. Preparing it {COSTS}.")
    say(f"The Python that runs your ComfyUI has it already: PATH/TO/ITS/python -m {module} .. downloads nothing.")
    if not sys.stdin.isatty():
        raise SystemExit("Nothing was downloaded: say --yes to prepare the environment without being asked.")
    try:
        answer = input("Prepare it now? [y/N] ")
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise SystemExit("Nothing was downloaded.")


def _steps(tests: bool, versions: Sequence[str]) -> list[Step]:
    steps = [venv_step()]
    for version in dict.fromkeys((NEWEST, *versions)):
        steps.append(comfyui_step(version))
    steps += [
        pip_step("torch", "torch and torchvision (about 3 GB)", lambda: TORCH_REQUIREMENTS),
        pip_step("comfyui", f"requirements of ComfyUI {NEWEST}", comfyui_requirements),
        pip_step("torchaudio", "torchaudio", lambda: TORCHAUDIO_REQUIREMENTS, "--no-deps"),
    ]
    if tests:
        bare = TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES
        tools, options = locked("tools", TEST_REQUIREMENTS)
        newer, _ = locked("newer", (*NEWEST_PACKAGES, *MANAGER_REQUIREMENTS))
        steps += [
            pip_step("tests", "test tools", lambda: tools, *options),
            pip_step("tests-bare", "reference packages for the tests", lambda: bare, "--no-deps"),
            folder_step("newer packages than ComfyUI asks for", newest_packages_path(), newer),
        ]
    return steps


def _mention_old_environments() -> None:
    for path in sorted(home().glob("env-*")):
        if path != environment_path():
            say(f"{path} belongs to another Python or an earlier version; delete it if nothing uses it.")
