"""`python -m tests.pack_for_gpu [FOLDER]`: what a bare machine with a GPU carries along for the check of it.

site.tar.xz     Python packages that ComfyUI needs beside what such a machine has: wheels from the package index
comfyui.tar.xz  ComfyUI without what a run in one process does not need

The machine is taken to have Python (--python), torch, Triton, transformers and what they need, and no network. FOLDER
(default: .gpu of the repository, which git is to ignore) goes there with the repository; the docstring of
bonsai_ops/tools/bench/gpu_check says how to go on. comfy-kitchen's CUDA library holds machine code for many GPUs, far
more bytes than all else together: that for GPUs other than --gpu is overwritten with zeros, which take no room in the
archive. Where it does not work, unpack.py takes it away.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bonsai_ops.tools.bench.gpu_check.unpack import COMFYUI, SITE
from bonsai_ops.tools.environment import PLUGIN, ensure_or_exit

PACKAGES = (
    *("comfy-kitchen", "comfy-aimdo", "torchsde", "trampoline", "spandrel", "simpleeval", "blake3"),
    *("alembic", "Mako", "SQLAlchemy", "greenlet"),
    *("pydantic", "pydantic-core", "pydantic-settings", "annotated-types", "typing-inspection", "python-dotenv"),
)
"""Beside torch and transformers; in the versions that ComfyUI and pydantic ask for, else the newest."""
WITHOUT_WHEEL = ("gemlite==0.6.0.post2",)
"""Published as sources alone; of Python only."""
LEFT_OUT = frozenset(
    {*("tests", "tests-unit", "script_examples", "blueprints", ".github", ".ci", "web"), "openapi.yaml"}
)
"""Of ComfyUI, at its top."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
CONTAINER = struct.pack("<I", 0xBA55ED50)
MACHINE_CODE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both archives."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.pack_for_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=PLUGIN / ".gpu")
    parser.add_argument("--python", default="3.12", help="version of the Python there (3.12)")
    parser.add_argument("--gpu", type=int, nargs="+", default=[90], help="capabilities, 90 for H100 and H200")
    parser.add_argument(
        "--package", action="append", default=[], help="one more that the machine lacks, such as einops"
    )
    parser.add_argument("--comfyui", type=Path, help="this ComfyUI, not the pinned one")
    arguments = parser.parse_args(argv)
    comfyui = ensure_or_exit(comfyui=arguments.comfyui).comfyui
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site = Path(temporary) / "wheels", Path(temporary) / "site"
        download([*PACKAGES, *arguments.package], arguments.python, comfyui / "requirements.txt", wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        for library in site.rglob("*.so"):
            strip(library, arguments.gpu)
        write(arguments.folder / SITE, site)
    write(arguments.folder / COMFYUI, comfyui, LEFT_OUT)
    for name in (SITE, COMFYUI):
        print(f"{arguments.folder / name}: {(arguments.folder / name).stat().st_size / 1e6:.1f} MB")
    return 0


def download(packages: Sequence[str], python: str, requirements: Path, folder: Path) -> None:
    """The wheels of these packages, without what they need, for that Python on Linux. Raises SystemExit."""
    wanted = pinned(packages, requirements.read_text(encoding="utf-8"))
    where = [part for platform in PLATFORMS for part in ("--platform", platform)]
    version = ["--python-version", python, "--implementation", "cp", "--abi", f"cp{python.replace('.', '')}"]
    version += ["--abi", "abi3", "--abi", "none"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *where, *version]

    done = subprocess.run([*command, "--dest", str(folder), *wanted], check=False)
    if done.returncode:
        raise SystemExit(f"pip found no wheel of one of {', '.join(wanted)} for Python {python}: see above.")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), *WITHOUT_WHEEL]
    if subprocess.run(build, check=False).returncode:
        raise SystemExit(f"pip could not build {', '.join(WITHOUT_WHEEL)}: see above.")
    core = needed_core(folder)
    if core and subprocess.run([*command, "--dest", str(folder), core], check=False).returncode:
        raise SystemExit(f"pip found no wheel of {core} for Python {python}: see above.")


def pinned(packages: Sequence[str], requirements: str) -> list[str]:
    """The packages as a requirements file pins them; pydantic-core comes after pydantic, which names its version."""
    found = dict(re.findall(r"^([\w.-]+)\s*((?:[=~<>!]=|<|>)[^\s#;]+)", requirements, re.MULTILINE))
    by_name = {name.lower(): f"{name}{version}" for name, version in found.items()}
    return [by_name.get(name.lower(), name) for name in packages if name != "pydantic-core"]


def needed_core(folder: Path) -> str | None:
    """What pydantic's wheel asks for, such as "pydantic-core==2.50.5"."""
    for wheel in folder.glob("pydantic-[0-9]*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            found = re.search(r"^Requires-Dist: pydantic[-_]core\s*\(?(==[\w.]+)", archive.read(name).decode(), re.M)
        return f"pydantic-core{found[1]}" if found else "pydantic-core"
    return None


def entries(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(kind, capability, offset, bytes) of the code in every fat binary of CUDA that a file holds.

    A container is <I magic, H version, H bytes of the header, Q bytes that follow>; an entry <H kind (1 PTX, 2 machine
    code), H, I bytes of the header, Q bytes that follow> and, at byte 28 of its header, I the capability times 10. No
    documentation says so: it was taken from libraries that nvcc had made and from descriptions of them.
    """
    start = data.find(CONTAINER)
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        at, end = start + header, start + header + size
        while at + 32 <= end <= len(data):
            kind, _, own, length = struct.unpack_from("<HHIQ", data, at)
            if own < 32 or at + own + length > end:
                break
            yield kind, struct.unpack_from("<I", data, at + 28)[0], at + own, length
            at += own + length
        start = data.find(CONTAINER, max(end, start + 4) if end <= len(data) else start + 4)


def strip(library: Path, keep: Sequence[int]) -> int:
    """Zeros over the machine code for other GPUs, if there is some for each of `keep`; how many bytes."""
    data = bytearray(library.read_bytes())
    found = list(entries(bytes(data)))
    if not set(keep) <= {capability for kind, capability, *_ in found if kind == MACHINE_CODE}:
        return 0
    gone = 0
    for _, capability, at, length in found:
        if capability not in keep:
            data[at : at + length] = bytes(length)
            gone += length
    library.write_bytes(data)
    return gone


def write(file: Path, folder: Path, left_out: frozenset[str] = frozenset()) -> None:
    """A .tar.xz of what the folder holds, without bytecode and what is left out of its top."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts
        return None if (parts[:1] and parts[0] in left_out) or "__pycache__" in parts else member

    with tarfile.open(file, "w:xz") as archive:
        archive.add(folder, ".", filter=kept)


if __name__ == "__main__":
    raise SystemExit(main())
