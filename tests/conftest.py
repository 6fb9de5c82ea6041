"""Shared fixtures, and the order in which modules are found.

ComfyUI owns the top-level names `nodes`, `server`, `utils` and `tests`, so its folder comes before this repository:
`import nodes` finds ComfyUI's, `import bonsai_ops` ours. The folder of the tests comes third, for `import peers`
and `import twins`.
ComfyUI's options are set here, before anything imports comfy: processor only, files in a temporary base directory.
BONSAI_TEST_DEVICE=cuda lets the ComfyUI inside this process use the GPU in its classic way, cuda-dynamic with dynamic
VRAM; no test names a device itself (tests/unit/test_devices.py). BONSAI_PACKAGES names a folder of packages
that come before those of the environment, in this process, its children and the server of its own ComfyUI.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bonsai_ops.tools.bench.inside import comfyui as host
from bonsai_ops.tools.environment import COMFYUI_VERSIONS, NEWEST, comfyui_version, link_plugin
from bonsai_ops.tools.environment import comfyui_path as path_of_version
from bonsai_ops.tools.server import ComfyServer

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
DEVICES = ("cpu", "cuda", "cuda-dynamic")
DEVICE = os.environ.get("BONSAI_TEST_DEVICE", "cpu")
ELSEWHERE = {
    "processor": ("cpu",),
    "classic": ("cpu", "cuda"),
}
"""{mark: the devices on which a test with it runs}"""

MAY_BE_SKIPPED = {
    "BONSAI_PACKAGES names no folder": "tests/host/test_other_hosts.py runs it with newer packages",
    "no comfyui-manager: BONSAI_PACKAGES names no folder with it": "the same",
    "this user writes anywhere": "root does, and the other ways in which a folder is spoilt are tried",
}
"""{reason of a skip that --no-skips allows: why nothing is missed}"""

pytest.register_assert_rewrite("twins", "peers.families")


def _put_first(folders: list[Path]) -> None:
    names = [str(folder) for folder in folders]
    sys.path[:] = names + [entry for entry in sys.path if entry not in (*names, "")]


def _find_comfyui() -> Path | None:
    chosen = os.environ.get("BONSAI_COMFYUI")
    folder = Path(chosen).resolve() if chosen else path_of_version(NEWEST)
    return folder if (folder / "main.py").is_file() else None


def _set_comfyui_options(base_directory: Path) -> None:
    """Have comfy.cli_args parse our options instead of pytest's; it reads sys.argv once, when it is imported."""
    import comfy.options

    kept = sys.argv
    try:
        host.begin(DEVICE.partition("-")[0], DEVICE.endswith("-dynamic"), ["--base-directory", str(base_directory)])
        import comfy.cli_args

        importlib.import_module("utils.extra_config")  # as main.py: nodes.py puts a folder with another utils first
    finally:
        sys.argv = kept
        comfy.options.enable_args_parsing(False)
    if DEVICE != "cpu":
        host.finish()


def _check_device() -> None:
    if DEVICE not in DEVICES:
        raise pytest.UsageError(f"BONSAI_TEST_DEVICE is {DEVICE}, expected one of {', '.join(DEVICES)}.")


def _find_packages() -> Path | None:
    chosen = os.environ.get("BONSAI_PACKAGES")
    if not chosen:
        return None
    folder = Path(chosen).resolve()
    if not folder.is_dir():
        raise pytest.UsageError(f"BONSAI_PACKAGES names {folder}, which is not a folder.")
    os.environ["PYTHONPATH"] = str(folder)
    return folder


_check_device()
COMFYUI, PACKAGES = _find_comfyui(), _find_packages()
VERSIONS = tuple(dict.fromkeys([*COMFYUI_VERSIONS, *([comfyui_version(COMFYUI)] if COMFYUI else [])]))
"""The pinned ones and that of this process."""
BASE_DIRECTORY = Path(tempfile.mkdtemp(prefix="bonsai-tests-")).resolve()
_put_first([folder for folder in (COMFYUI, REPOSITORY, TESTS, PACKAGES) if folder])
if COMFYUI is not None:
    _set_comfyui_options(BASE_DIRECTORY)


WITH_SERVER = ("test_blueprints", "test_matrix", "test_product", "test_sharing", "test_soak")
SEPARATE = ("test_guards", "test_other_hosts", "test_seedling_interpreted", "test_triton")
"""Files whose slow tests each start a process of their own and share nothing."""


def worker_group(test: str) -> str:
    """What a test (its id) shares with others: a ComfyUI server, a family of packs, or else its file.

    Several workers run whole groups, so that no worker prepares again what another has.
    """
    file, _, name = test.partition("::")
    stem = Path(file).stem
    parameters = name.partition("[")[2].rstrip("]").split("-")
    if stem in WITH_SERVER:
        return f"ComfyUI {parameters[0] if parameters[0] in VERSIONS else NEWEST}"
    if stem == "test_pictures":
        return "-".join((stem, *parameters[:2]))
    return test if stem in SEPARATE else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's own groups are marks, which its newest release does not find again with the newest pytest."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return worker_group(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long goes first, so that no worker is left alone with it at the end. Other devices' is skipped."""
    for mark, devices in ELSEWHERE.items():
        if DEVICE not in devices:
            skip = pytest.mark.skip(reason=f"of {' and '.join(devices)} only, this is {DEVICE}")
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(skip)
    slow = {worker_group(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: worker_group(item.nodeid) not in slow)


class NoSkips:
    """Fails a run in which a test was skipped for another reason than those of MAY_BE_SKIPPED, and says which."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            if reason not in MAY_BE_SKIPPED:
                self.skipped.append(f"{report.nodeid}: {reason}")

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.skipped:
            terminalreporter.line(f"SKIPPED WHERE NONE MAY BE {line}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail where a test is skipped that can be run in CI")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(NoSkips())


def pytest_unconfigure() -> None:
    shutil.rmtree(BASE_DIRECTORY, ignore_errors=True)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI folder that `import comfy` and `import nodes` use in this process."""
    if COMFYUI is None:
        pytest.skip("no ComfyUI here: run the tests with `python -m tests`, or set BONSAI_COMFYUI")
    return COMFYUI


@pytest.fixture(scope="session")
def comfy_version(comfyui_path: Path) -> str:
    """The version of the ComfyUI in this process, such as "0.30.0"."""
    return comfyui_version(comfyui_path)


@pytest.fixture(scope="session")
def comfy_base_directory(comfyui_path: Path) -> Path:
    """Base directory (models, input, output) of the ComfyUI in this process, removed when the run ends."""
    return BASE_DIRECTORY


@pytest.fixture(scope="session")
def comfy_server(
    comfyui_path: Path, comfy_version: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ComfyServer]]:
    """A function from a ComfyUI version (default: that of this process) to a running server with this plugin.

    Each version is started once and stopped at the end. Models go to `server.base_directory / "models"`.
    """
    running: dict[str, ComfyServer] = {}

    def start(version: str = comfy_version) -> ComfyServer:
        if version not in running:
            folder = comfyui_path if version == comfy_version else path_of_version(version)
            if not (folder / "main.py").is_file():
                pytest.skip(f"ComfyUI {version} is not here: run the tests with `python -m tests`")
            base = tmp_path_factory.mktemp(f"comfyui-{version}")
            link_plugin(base)
            packages = PACKAGES if folder == comfyui_path else None
            options = _with_manager(base) if packages and (packages / "comfyui_manager").is_dir() else ()
            server = ComfyServer(Path(sys.executable), folder, base, extra_args=options, packages=packages)
            server.start()
            running[version] = server
        return running[version]

    yield start
    for server in running.values():
        server.stop()


def _with_manager(base_directory: Path) -> tuple[str, ...]:
    """The options that start ComfyUI with comfyui-manager, which is told to leave the network alone."""
    config = base_directory / "user" / "__manager" / "config.ini"
    config.parent.mkdir(parents=True)
    config.write_text("[default]\nnetwork_mode = offline\n", encoding="utf-8")
    return ("--enable-manager",)


@pytest.fixture(scope="session", params=VERSIONS)
def every_comfy_server(request: pytest.FixtureRequest, comfy_server: Callable[..., ComfyServer]) -> ComfyServer:
    """A running server of each supported ComfyUI version, and that of this process, in turn."""
    return comfy_server(request.param)
