"""Start, drive and stop a ComfyUI server as a separate process. Standard library only."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .environment import clean_environment, ending_by_exception, tail_of

HOST = "127.0.0.1"
_TAIL_LINES = 40
_POLL_SECONDS = 0.2


class PromptInterruptedError(RuntimeError):
    """The prompt ended because `interrupt` was called."""


class ComfyServer:
    """A ComfyUI process with its own base directory (models, custom_nodes, input, output, temp, user).

    python and comfyui are those of `environment.Environment`. port 0 takes a free one. With cpu, ComfyUI computes on
    the processor whatever the machine has. packages: a folder that comes before the packages of python. extra_args go
    to main.py as they are. Use it as a context manager, or call `start` and `stop`: within the former a signal that
    ends the program ends ComfyUI first.
    """

    def __init__(
        self,
        python: Path,
        comfyui: Path,
        base_directory: Path,
        port: int = 0,
        extra_args: Sequence[str] = (),
        cpu: bool = True,
        packages: Path | None = None,
    ) -> None:
        self.python = Path(python).absolute()  # not resolved: that would leave a venv
        self.comfyui = Path(comfyui).resolve()
        self.base_directory = Path(base_directory).resolve()
        self.port = port
        self.extra_args = tuple(extra_args)
        self.cpu = cpu
        self.packages = packages
        self.log = self.base_directory / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._within = contextlib.ExitStack()
        # Without proxies: the variables http_proxy and the like must not redirect calls to this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def url(self) -> str:
        """Address of the server, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Id of the process that runs. Raises RuntimeError when none does."""
        self._check_alive()
        return self._process.pid

    def __enter__(self) -> ComfyServer:
        with contextlib.ExitStack() as within:
            within.enter_context(ending_by_exception())
            within.callback(self.stop)
            self.start()
            self._within = within.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._within.close()

    def start(self, timeout: float = 180.0) -> None:
        """Start the process and return when it answers. Raises RuntimeError when it ends or takes over `timeout` s."""
        if self._process is not None:
            raise RuntimeError("This ComfyUI is running already: call stop() first.")
        self.port = self.port or _free_port()
        if _answers(self.port):
            raise RuntimeError(f"Port {self.port} is in use by another program: choose another port, or 0 for any.")
        for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        modules = {"PYTHONPATH": str(self.packages.resolve())} if self.packages else {}
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.comfyui,
                env=clean_environment({"PYTHONUNBUFFERED": "1", **modules}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def command(self) -> list[str]:
        """The command line; an option that this ComfyUI does not know is left out."""
        known = (self.comfyui / "comfy" / "cli_args.py").read_text("utf-8")
        database = self.base_directory / "user" / "comfyui.db"
        options = {
            "--disable-api-nodes": [],
            "--disable-assets-autoscan": [],
            "--database-url": [f"sqlite:///{database.as_posix()}"],
        }
        command = [str(self.python), str(self.comfyui / "main.py"), *(["--cpu"] if self.cpu else [])]
        command += ["--listen", HOST, "--port", str(self.port), "--base-directory", str(self.base_directory)]
        command.append("--disable-auto-launch")
        for option, values in options.items():
            if f'"{option}"' in known:
                command += [option, *values]
        return [*command, *self.extra_args]

    def stop(self, timeout: float = 10.0) -> None:
        """End the process: ask, then kill after `timeout` seconds. Does nothing when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of what the process printed, without colour codes."""
        return re.sub(r"\x1b\[[0-9;]*m", "", tail_of(self.log, lines))

    def get(self, path: str, timeout: float = 30.0) -> Any:
        """GET a path such as "/queue" and return the JSON value. Raises RuntimeError for an error status."""
        return self._request(path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 30.0) -> Any:
        """POST a JSON body and return the JSON value, None for an empty answer. Raises RuntimeError likewise."""
        return self._request(path, json.dumps(body or {}).encode(), timeout)

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What the server says about all registered nodes, or about one of them."""
        return self.get(f"/object_info/{node}" if node else "/object_info", timeout=120.0)

    def interrupt(self) -> None:
        """Stop the prompt that is running."""
        self.post("/interrupt")

    def queue(self, api_graph: Mapping[str, Any]) -> str:
        """Queue a graph in API format and return its prompt id. Raises RuntimeError listing what is invalid."""
        answer = self.post("/prompt", {"prompt": api_graph, "client_id": uuid.uuid4().hex})
        if answer.get("node_errors"):  # the valid outputs of the graph were queued all the same
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise RuntimeError(_validation_message(answer))
        return answer["prompt_id"]

    def wait(
        self, prompt_id: str, timeout: float = 600.0, on_progress: Callable[[float, str], None] | None = None
    ) -> dict[str, Any]:
        """Wait for a prompt and return its history entry.

        on_progress gets the seconds waited and "queued", "running" or "step 2 of 4" (the newest progress bar in the
        log), about once a second. Raises RuntimeError when a node fails (with its type and message), when the process
        ends or when `timeout` seconds pass, and PromptInterruptedError.
        """
        self._check_alive()
        start = time.monotonic()
        reported = start - 1.0
        log_start = self.log.stat().st_size
        while True:
            self._check_alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                check_entry(entry)
                return entry
            now = time.monotonic()
            if now - start > timeout:
                raise RuntimeError(
                    f"The prompt {prompt_id} did not end within {timeout:.0f} s. Last lines of {self.log}:\n"
                    f"{self.log_tail()}"
                )
            if on_progress is not None and now - reported >= 1.0:
                reported = now
                on_progress(now - start, self._state(prompt_id, log_start))
            time.sleep(_POLL_SECONDS)

    def images(self, entry: Mapping[str, Any]) -> list[Path]:
        """The image files of a history entry, in the order of its nodes."""
        files = []
        for output in entry["outputs"].values():
            for image in output.get("images") or ():
                files.append(self.base_directory / image["type"] / image.get("subfolder", "") / image["filename"])
        return files

    def _state(self, prompt_id: str, log_start: int) -> str:
        if any(item[1] == prompt_id for item in self.get("/queue")["queue_pending"]):
            return "queued"
        with self.log.open("rb") as stream:
            stream.seek(log_start)
            bars = re.findall(rb"\|\s*(\d+)/(\d+) \[", stream.read())
        return f"step {int(bars[-1][0])} of {int(bars[-1][1])}" if bars else "running"

    def _wait_until_ready(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self._check_alive()
            with contextlib.suppress(OSError):  # not listening yet
                self.get("/system_stats", timeout=5.0)
                return
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(
            f"ComfyUI did not answer within {timeout:.0f} s. Last lines of {self.log}:\n{self.log_tail()}"
        )

    def _check_alive(self) -> None:
        if self._process is None:
            raise RuntimeError("This ComfyUI is not running: call start() first.")
        code = self._process.poll()
        if code is not None:
            raise RuntimeError(f"ComfyUI ended with code {code}. Last lines of {self.log}:\n{self.log_tail()}")

    def _request(self, path: str, body: bytes | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                data = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode("utf-8", "replace")
            raise RuntimeError(_http_message(path, error.code, text)) from None
        return json.loads(data) if data else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _http_message(path: str, code: int, text: str) -> str:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        return _validation_message(answer)
    return f"ComfyUI answered {path} with status {code}: {text[:500]}"


def _validation_message(answer: Mapping[str, Any]) -> str:
    """One line for the graph and one for each wrong input."""
    error = answer.get("error")
    lines = ["ComfyUI refused the graph."]
    if isinstance(error, dict):
        lines = [f"ComfyUI refused the graph: {_joined(error)}"]
    elif error:
        lines = [f"ComfyUI refused the graph: {error}"]
    for node, problem in (answer.get("node_errors") or {}).items():
        for item in problem.get("errors", ()):
            lines.append(f"  node {node} ({problem.get('class_type')}): {_joined(item)}")
    return "\n".join(lines)


def _joined(error: Mapping[str, Any]) -> str:
    return ": ".join(str(error[key]) for key in ("message", "details") if error.get(key))


def check_entry(entry: Mapping[str, Any]) -> None:
    """Raise for a history entry that reports an error or an interruption."""
    status = entry.get("status") or {}
    messages = dict(status.get("messages", ()))
    if "execution_interrupted" in messages:
        data = messages["execution_interrupted"]
        raise PromptInterruptedError(f"Interrupted at node {data.get('node_id')} ({data.get('node_type')}).")
    if status.get("status_str") == "error":
        data = messages.get("execution_error", {})
        raise RuntimeError(
            f"Node {data.get('node_id')} ({data.get('node_type')}) failed with {data.get('exception_type')}: "
            f"{str(data.get('exception_message', '')).strip()}\n{''.join(data.get('traceback', ()))}".rstrip()
        )
