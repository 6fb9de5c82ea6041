"""Which dtype a model computes in on a device: ComfyUI's choice, except that a CPU with fast bf16 uses it.

A text encoder keeps fp32 between its layers, as ComfyUI has it, and multiplies in what `text_dtype` says.
"""

from __future__ import annotations

import functools

import comfy.model_management
import torch
from comfy.cli_args import args

from ..kernels import cpu_has_fast_bf16
from .flags import asked_text_dtype
from .linear import make_bonsai_ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(choice: str, device: torch.device, weights: int) -> torch.dtype:
    """The dtype for `choice` (auto or one of DTYPES) of a model with so many weights on `device`.

    auto is what the command line asks for (--force-fp32, --bf16-unet and the like); on a CPU, which computes in each of
    them, to the letter. fp64 becomes fp32.
    """
    if choice != "auto":
        return DTYPES[choice]
    if device.type == "cpu":
        return _on_a_cpu()
    supported = list(DTYPES.values())
    dtype = comfy.model_management.unet_dtype(
        model_params=weights, weight_dtype=torch.bfloat16, supported_dtypes=supported
    )
    dtype = comfy.model_management.unet_manual_cast(dtype, device, supported) or dtype
    return dtype if dtype in supported else torch.float32


def _on_a_cpu() -> torch.dtype:
    if args.force_fp32 or args.fp32_unet or args.fp64_unet:
        return torch.float32
    if args.bf16_unet or args.fp16_unet:
        return torch.bfloat16 if args.bf16_unet else torch.float16
    return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32


def text_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype that the linear layers of a text encoder multiply in on `device`, for auto or one of DTYPES.

    auto is what the command line asks for (--bf16-text-enc and the like, --force-fp32), else bf16 on a CPU that has it
    in hardware and on a GPU that ComfyUI finds fast in it, then fp16 on such a GPU: bf16 is what ComfyUI generates text
    in on GPUs, and what the packs' pipelines encode prompts in.
    """
    if choice != "auto":
        return DTYPES[choice]
    if (asked := asked_text_dtype()) in DTYPES.values():
        return asked
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_fast_bf16() and not args.force_fp32 else torch.float32
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def make_text_ops(choice: str) -> type:
    """Operations of `make_bonsai_ops` whose linear layers multiply fp32 in `text_dtype(choice, device of the input)`.

    They take and give fp32. In fp16 each token is multiplied by a power of two that makes its largest value about 1, as
    language models have values beyond fp16 in some of them; its product is divided by that in fp32.
    """
    base = make_bonsai_ops()
    chosen = functools.cache(functools.partial(text_dtype, choice))

    class TextOps(base):
        class Linear(base.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                dtype = chosen(x.device) if x.dtype == torch.float32 else x.dtype
                if dtype == x.dtype:
                    return super().forward(x)
                if dtype != torch.float16 or self.has_bias:
                    return super().forward(x.to(dtype)).float()
                _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
                return torch.ldexp(super().forward(torch.ldexp(x, -exponent).half()).float(), exponent)

    return TextOps
