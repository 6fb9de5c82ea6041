"""A process with a ComfyUI of its own for tests/host/test_flags.py; prints one line of JSON.

python tests/flags_child.py COMFYUI_FOLDER BASE_DIRECTORY PACK [--a-flag-of-ComfyUI ..]
    loads a pack, and an unpacked text encoder beside it, and says what became of them under these flags
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
UNET = ("bf16_unet", "fp16_unet", "fp32_unet", "fp64_unet", "fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet")


def mapped(folder: Path) -> list[str]:
    """Files below a folder that this process has mapped."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    return sorted({Path(line.split(maxsplit=5)[5]).name for line in lines if str(folder) in line})


def computed(path: Path) -> dict[str, str]:
    """{what the command line asks for: what auto computes in}; the option itself is what the parser would set."""
    from comfy.cli_args import args

    from bonsai_ops.host.loader import load_bonsai_model

    def load() -> str:
        return str(load_bonsai_model(path).model.get_dtype_inference())

    found = {"": load()}
    for name in UNET:
        if getattr(args, name) is False:
            setattr(args, name, True)
            found[name] = load()
            setattr(args, name, False)
    return found


def drawn(model: Any, clip: Any, vae: Any) -> Any:
    """A picture [64, 64, 3] through ComfyUI's own nodes."""
    import torch

    import nodes

    (text,) = nodes.CLIPTextEncode().encode(clip, "a green bonsai tree in a blue pot")
    latent = {"samples": torch.zeros(1, 128, 4, 4)}
    (latent,) = nodes.KSampler().sample(model, 1, 1, 1.0, "euler", "simple", text, text, latent)
    (picture,) = nodes.VAEDecode().decode(vae, latent)
    return picture[0].float()


def report(pack: Path) -> dict[str, Any]:
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
    from bonsai_ops.host.vae import load_vae

    unpacked = pack.parent / "unpacked"
    model, clip, vae = load_bonsai_model(pack), load_bonsai_text_encoder(pack), load_vae(pack)
    plain = load_bonsai_text_encoder(unpacked) if unpacked.is_dir() else clip
    layers = dict(plain.patcher.model.named_modules())
    (linear,) = (m for n, m in layers.items() if n.endswith("layers.0.mlp.up_proj"))
    left = mapped(pack.parent)
    first = drawn(model, clip, vae)
    again = drawn(model, clip, vae)
    encoded = plain.encode_from_tokens(plain.tokenize("a tree"))
    return {
        "computed": computed(pack),
        "vae": str(vae.vae_dtype),
        "vae_device": str(vae.device),
        "text": str(linear.weight.dtype),
        "mapped": left,
        "finite": bool(first.isfinite().all() and encoded.isfinite().all() and first.std() > 0),
        "same": bool((first == again).all()),
        "mode": model.get_attachment("bonsai").mode,
    }


def main(folder: str, base: str, pack: str, *flags: str) -> None:
    """Puts ComfyUI first on the path, as conftest.py does, and prints the report."""
    sys.path[:0] = [folder, str(REPOSITORY)]
    sys.argv = ["main.py", "--cpu", "--base-directory", base, *flags]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("torch").set_num_threads(1)
    print(json.dumps(report(Path(pack))))


if __name__ == "__main__":
    main(*sys.argv[1:])
