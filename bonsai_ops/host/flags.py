"""The options that ComfyUI is started with, as far as they concern models, and what becomes of each here.

`FLAGS` has those that concern loading, number formats, memory, attention, devices and exactness, `NOT_OURS` all others:
tests/host/test_flags.py compares both with ComfyUI's, so that a new option is read before it is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.cli_args import args

from ..weights.packed_weight import PackedWeight


@dataclass(frozen=True)
class Flag:
    """names: options without their dashes, spaces in between. user: the file of ours that asks, "" if ComfyUI does.

    since: the ComfyUI that brought it, if that is newer than those that the tests have.
    """

    names: str
    does: str
    user: str = ""
    since: str = ""


FLAGS = (
    # loading
    Flag("disable-mmap", "files are read into memory: after loading nothing of them is mapped", "host/flags.py"),
    Flag("mmap-torch-files", "as without it: .pt files are mapped like all others, unless disable-mmap forbids it"),
    # number formats: transformer
    Flag("force-fp32", "auto computes in fp32, in text encoders too", "host/precision.py"),
    Flag("fp32-unet", "auto computes in fp32", "host/precision.py"),
    Flag("fp64-unet", "auto computes in fp32, the most exact that packed layers know", "host/precision.py"),
    Flag("bf16-unet", "auto computes in bf16; on a GPU that cannot, in what ComfyUI casts to", "host/precision.py"),
    Flag("force-fp16 fp16-unet", "auto computes in fp16; on a GPU that cannot, as above", "host/precision.py"),
    Flag(
        "fp8_e4m3fn-unet fp8_e5m2-unet fp8_e8m0fnu-unet",
        "packed layers are smaller than fp8 and stay packed, dense ones stay as they are; auto computes as without it",
    ),
    # number formats: text encoder, VAE
    Flag(
        "fp8_e4m3fn-text-enc fp8_e5m2-text-enc fp16-text-enc bf16-text-enc fp32-text-enc",
        "the linear layers of an unpacked text encoder are kept in that dtype; packed ones stay packed. auto "
        "multiplies both in it, but for fp8; all else of a text encoder is computed in fp32, as in ComfyUI's",
        "host/flags.py",
    ),
    Flag("fp16-vae fp32-vae bf16-vae", "as for every VAE: comfy.sd.VAE chooses"),
    Flag("cpu-vae", "as for every VAE: comfy.sd.VAE chooses"),
    Flag("fp16-intermediates", "as for every model: ComfyUI's nodes convert"),
    Flag("force-channels-last", "as for every model: convolutions only"),
    # memory
    Flag("gpu-only highvram normalvram lowvram novram", "as for every model: ComfyUI's ModelPatcher moves the codes"),
    Flag("disable-dynamic-vram enable-dynamic-vram", "as for every model; the node's input memory has the last word"),
    Flag("reserve-vram vram-headroom disable-nvml-pressure disable-smart-memory", "ComfyUI's memory management asks"),
    Flag("async-offload disable-async-offload", "codes come through comfy.ops.cast_bias_weight, which asks"),
    Flag("disable-pinned-memory force-non-blocking fast-disk", "codes come through comfy.ops, which asks"),
    Flag("cache-classic cache-lru cache-ram high-ram", "ComfyUI's executor asks; a text encoder keeps some results"),
    Flag("cache-none", "ComfyUI's executor asks; text encoders keep nothing either", "host/text_states.py"),
    # attention
    Flag(
        "use-split-cross-attention use-quad-cross-attention use-pytorch-cross-attention use-sage-attention "
        "use-flash-attention disable-xformers",
        "ComfyUI's choice is used; only its sub-quadratic function on a CPU is called in parts (attention.py)",
    ),
    Flag("use-ck-attention", "as the others that choose a function", since="0.33.0"),
    Flag("force-upcast-attention dont-upcast-attention", "as for every model, in parts too"),
    # devices
    Flag("cpu cuda-device default-device directml oneapi-device-selector", "comfy.model_management chooses the device"),
    Flag("cuda-malloc disable-cuda-malloc disable-ipex-optimize", "torch's matter"),
    Flag(
        "enable-triton-backend disable-triton-backend supports-fp8-compute",
        "comfy-kitchen's kernels and fp8 only: our own are chosen by the device",
    ),
    Flag(
        "disable-cuda-graphs",
        "as without it: ComfyUI captures the blocks of Gemma 4 and of MiniMax's music model only, when they generate",
        since="0.33.0",
    ),
    # exactness
    Flag("deterministic", "our kernels are deterministic with and without it"),
    Flag("fast", "our layers keep the mode that the node names; fp16_accumulation makes ComfyUI's auto prefer fp16"),
)

NOT_OURS = (
    "listen port tls-keyfile tls-certfile enable-cors-header max-upload-size base-directory extra-model-paths-config "
    "models-directory output-directory temp-directory input-directory user-directory auto-launch disable-auto-launch "
    "preview-method preview-size enable-manager disable-manager-ui enable-manager-legacy-ui default-hashing-function "
    "dont-print-server quick-test-for-ci windows-standalone-build disable-metadata disable-all-custom-nodes "
    "whitelist-custom-nodes disable-api-nodes multi-user verbose log-stdout front-end-version front-end-root "
    "enable-compress-response-body comfy-api-base database-url disable-assets-autoscan enable-assets "
    "enable-asset-hashing feature-flag list-feature-flags debug-hang"
)
"""Server, page, folders and logs. Folders are asked of folder_paths, disable-metadata by Save Bonsai Model."""


def maps_files() -> bool:
    """Whether weights may stay mapped from their file, as ComfyUI leaves them unless it is told not to."""
    return not args.disable_mmap


def kept_as_asked(weights: Mapping[str, PackedWeight | torch.Tensor]) -> dict[str, PackedWeight | torch.Tensor]:
    """The weights of a text encoder, matrices of unpacked linear layers in the dtype that the command line asks for."""
    asked, kept = asked_text_dtype(), dict(weights)
    for name, weight in weights.items() if asked is not None else ():
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and "embed" not in name:
            kept[name] = weight.to(asked)
    return kept


def asked_text_dtype() -> torch.dtype | None:
    """The dtype that the command line asks of text encoders, None if it does not."""
    asked = (
        args.fp8_e4m3fn_text_enc
        or args.fp8_e5m2_text_enc
        or args.fp16_text_enc
        or args.bf16_text_enc
        or args.fp32_text_enc
    )
    return comfy.model_management.text_encoder_dtype() if asked else None
