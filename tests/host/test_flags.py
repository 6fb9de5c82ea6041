"""Options that ComfyUI is started with: each is known (bonsai_ops/host/flags.py), and does here what stands there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import FOLDERS, PINNED, said_by, skip_without
from safetensors.torch import save_file

from bonsai_ops.tools.environment import NEWEST, PLUGIN

pytestmark = pytest.mark.host

SEEDLING = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"


def options(folder: Path) -> set[str]:
    """The options of the ComfyUI in a folder, without dashes."""
    skip_without(folder)
    text = (folder / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    return set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", text))


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def listed() -> tuple[set[str], set[str]]:
    """(options that concern us, all others) as the table has them."""
    from bonsai_ops.host.flags import FLAGS, NOT_OURS

    return {name for flag in FLAGS for name in flag.names.split()}, set(NOT_OURS.split())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_option_of_comfyui_is_listed(folder: Path, comfyui_path: Path) -> None:
    ours, others = listed()
    found = options(folder)
    assert len(found) > 80
    assert sorted(found - ours - others) == [], "read what it does, then add it to bonsai_ops/host/flags.py"


def test_every_listed_option_is_one_of_comfyuis(comfyui_path: Path) -> None:
    """Those of a ComfyUI that is not pinned say which."""
    from bonsai_ops.host.flags import FLAGS

    ours, others = listed()
    assert not ours & others
    newer = {name: flag.since for flag in FLAGS if flag.since for name in flag.names.split()}
    assert sorted((ours | others) - set().union(*map(options, PINNED))) == sorted(newer)
    assert all(numbers(since) > numbers(NEWEST) for since in newer.values())


def test_the_files_that_ask_are_the_ones_in_the_table(comfyui_path: Path) -> None:
    from bonsai_ops.host.flags import FLAGS

    ours, _ = listed()
    said = {(flag.user, name.replace("-", "_")) for flag in FLAGS for name in flag.names.split() if flag.user}
    asked = set()
    for file in (PLUGIN / "bonsai_ops" / "host").rglob("*.py"):
        user = file.relative_to(PLUGIN / "bonsai_ops").as_posix()
        asked |= {(user, name) for name in re.findall(r"\bargs\.(\w+)", file.read_text(encoding="utf-8"))}
    asked = {(user, name) for user, name in asked if name.replace("_", "-") in {n.replace("_", "-") for n in ours}}
    # --force-fp16 sets fp16_unet in ComfyUI's own parser
    assert asked == said - {("host/precision.py", "force_fp16")}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pack, and beside it the same text encoder unpacked."""
    from bonsai_ops.weights.packed_weight import PackedWeight
    from bonsai_ops.weights.read import open_text_encoder, read_weights

    folder = tmp_path_factory.mktemp("flags")
    shutil.copytree(SEEDLING, folder / "pack")
    weights = read_weights(open_text_encoder(folder / "pack")[0])
    dense = {n: w.dequantize() if isinstance(w, PackedWeight) else w for n, w in weights.items()}
    (folder / "unpacked" / "text_encoder").mkdir(parents=True)
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in dense.items()},
        folder / "unpacked" / "text_encoder" / "model.safetensors",
    )
    return folder / "pack"


@pytest.fixture(scope="module")
def start(comfyui_path: Path, pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A function from options to what flags_child.py says; options that this ComfyUI lacks are left out."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    base = tmp_path_factory.mktemp("base")

    def run(*flags: str) -> dict[str, Any]:
        if flags not in known:
            there = options(comfyui_path)
            given = [f"--{flag}" for flag in flags if flag.partition("=")[0] in there]
            known[flags] = said_by("flags_child.py", comfyui_path, base, str(pack), *given)
        return known[flags]

    return run


PLAIN = ("mmap-torch-files", "enable-triton-backend", "disable-xformers", "use-quad-cross-attention")
FIRST = (
    "disable-mmap",
    "force-fp32",
    "fp32-vae",
    "cpu-vae",
    "fp8_e4m3fn-text-enc",
    "use-pytorch-cross-attention",
    "force-upcast-attention",
    "deterministic",
    "force-channels-last",
    "fp16-intermediates",
    "cache-none",
)
SECOND = (
    "force-fp16",
    "bf16-vae",
    "bf16-text-enc",
    "use-split-cross-attention",
    "dont-upcast-attention",
    "fast",
    "disable-smart-memory",
    "disable-pinned-memory",
    "force-non-blocking",
    "disable-async-offload",
    "disable-dynamic-vram",
    "reserve-vram=1",
    "cache-classic",
    "supports-fp8-compute",
    "disable-triton-backend",
)
STARTS = (PLAIN, FIRST, SECOND)
SET_LATER = {"bf16-unet", "fp16-unet", "fp32-unet", "fp64-unet", "fp8_e4m3fn-unet", "fp8_e5m2-unet", "fp8_e8m0fnu-unet"}
"""Options that ComfyUI asks at each load: the child sets them one after another."""
SAME_AS = {
    "fp8_e5m2-text-enc": "fp8_e4m3fn-text-enc",
    "fp32-text-enc": "bf16-text-enc",
    "fp16-text-enc": "bf16-text-enc",
    "fp16-vae": "bf16-vae",
    "cache-ram": "cache-classic",
    "cache-lru": "cache-classic",
    "high-ram": "cache-classic",
}
"""Options whose group excludes another start, and the one of the same kind that is started."""
NOT_ON_A_CPU = {
    "gpu-only",
    "highvram",
    "lowvram",
    "novram",
    "normalvram",
    "cuda-device",
    "default-device",
    "directml",
    "oneapi-device-selector",
    "cuda-malloc",
    "disable-cuda-malloc",
    "disable-ipex-optimize",
    "enable-dynamic-vram",
    "vram-headroom",
    "disable-nvml-pressure",
    "async-offload",
    "fast-disk",
    "use-sage-attention",
    "use-flash-attention",
    "use-ck-attention",
    "disable-cuda-graphs",
}
"""Options that say where on a GPU weights lie, or that need a package: tests/host/model has their paths."""


def test_every_listed_option_is_tried(comfyui_path: Path) -> None:
    tried = {flag.partition("=")[0] for start in STARTS for flag in start}
    ours, _ = listed()
    assert ours - tried - SET_LATER - NOT_ON_A_CPU - SAME_AS.keys() - {"cpu"} == set()
    assert set(SAME_AS.values()) <= tried


@pytest.mark.parametrize("flags", STARTS, ids=["plain", "first", "second"])
def test_pictures_are_drawn_whatever_the_options(flags: tuple[str, ...], start: Callable[..., dict[str, Any]]) -> None:
    found = start(*flags)
    assert found["finite"] and found["same"] and found["mode"] == "exact"


def test_no_file_stays_mapped_where_that_is_forbidden(start: Callable[..., dict[str, Any]]) -> None:
    if not Path("/proc/self/maps").is_file():
        pytest.skip("this system does not say what is mapped")
    assert start(*FIRST)["mapped"] == []
    assert start(*PLAIN)["mapped"] != []  # so the question is the right one


def test_auto_computes_in_what_the_command_line_asks_for(start: Callable[..., dict[str, Any]]) -> None:
    from bonsai_ops.kernels import cpu_has_fast_bf16

    own = "torch.bfloat16" if cpu_has_fast_bf16() else "torch.float32"
    expected = {
        "": own,
        "bf16_unet": "torch.bfloat16",
        "fp16_unet": "torch.float16",
        "fp32_unet": "torch.float32",
        "fp64_unet": "torch.float32",
        "fp8_e4m3fn_unet": own,
        "fp8_e5m2_unet": own,
        "fp8_e8m0fnu_unet": own,
    }
    assert start(*PLAIN)["computed"] == expected
    assert set(start(*FIRST)["computed"].values()) == {"torch.float32"}
    assert start(*SECOND)["computed"][""] == "torch.float16"


def test_text_encoder_and_vae_are_kept_as_the_command_line_asks(start: Callable[..., dict[str, Any]]) -> None:
    plain, first, second = (start(*flags) for flags in STARTS)
    assert (plain["text"], first["text"]) == ("torch.bfloat16", "torch.float8_e4m3fn")
    assert (first["vae"], second["vae"]) == ("torch.float32", "torch.bfloat16") and first["vae_device"] == "cpu"


@pytest.mark.parametrize("option", ["fp8_e4m3fn", "fp8_e5m2", "fp16", "bf16", "fp32"])
def test_an_unpacked_text_encoder_is_kept_as_asked(
    option: str, comfyui_path: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from comfy.cli_args import args

    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    monkeypatch.setattr(args, f"{option}_text_enc", True)
    model = load_bonsai_text_encoder(pack.parent / "unpacked").patcher.model
    (linear,) = (m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    names = {"fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp16": "float16", "bf16": "bfloat16"}
    assert linear.weight.dtype == getattr(torch, names.get(option, "float32"))


@pytest.mark.parametrize("option", ["force_fp32", "fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_processor_obeys_with_and_without_fast_bf16(
    fast: bool, option: str, comfyui_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from comfy.cli_args import args

    from bonsai_ops.host import precision

    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: fast)
    cpu = torch.device("cpu")
    assert precision.compute_dtype("auto", cpu, 1) == (torch.bfloat16 if fast else torch.float32)
    monkeypatch.setattr(args, option, True)
    asked = {"bf16_unet": torch.bfloat16, "fp16_unet": torch.float16}.get(option, torch.float32)
    assert precision.compute_dtype("auto", cpu, 1) == asked
    assert precision.compute_dtype("fp16", cpu, 1) == torch.float16  # the node has the last word
