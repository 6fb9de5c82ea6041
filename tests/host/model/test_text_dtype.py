"""The number format in which a text encoder multiplies: its embeddings stay those of fp32 but for its rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import load_device, relative, run_node

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import PLUGIN

pytestmark = pytest.mark.host

SEEDLING = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
ERRORS = {"bf16": (1e-4, 2e-2), "fp16": (1e-5, 2e-3)}
"""Least and largest relative error of the embeddings of a prompt's tokens. Found: bf16 1.5e-3 with the trained weights,
1.0e-2 with random ones; fp16 an eighth of that."""
PROMPT = "a small tree in a blue pot"
SIZES = synthetic.TextGeometry(hidden=64, mlp=64, heads=1, key_heads=1, layers=29)


@pytest.fixture(scope="module")
def load(comfy: Any) -> Callable[..., Any]:
    """(folder, dtype) -> CLIP."""
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    return lambda folder, dtype="auto": load_bonsai_text_encoder(folder, compute_dtype=dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text encoder that was trained, one of random weights, and one whose numbers fp16 could not hold.

    Language models have a few channels of enormous values, which fp32 keeps between the layers.
    """
    found = {name: tmp_path_factory.mktemp(name) for name in ("random", "large")}
    synthetic.write_text_encoder(found["random"], SIZES)
    tensors = load_file(found["random"] / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers.2." in name and ("up_proj" in name or "down_proj" in name) and not name.endswith(".weight"):
            tensors[name] = tensor * 3000
    save_file(tensors, found["large"] / "model.safetensors")
    return {**found, "trained": SEEDLING}


@pytest.fixture(scope="module")
def embeddings(load: Callable[..., Any], folders: dict[str, Path]) -> Callable[[str, str], torch.Tensor]:
    """(name of a folder, dtype) -> embeddings of a prompt's first tokens; the same tensor at each call."""
    return functools.cache(lambda name, dtype: encoded(load(folders[name], dtype)))


def encoded(clip: Any) -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))[0][0][:, :16]


@pytest.mark.parametrize(
    ("name", "dtype"), [("trained", "bf16"), ("trained", "fp16"), ("random", "bf16"), ("large", "fp16")]
)
def test_error_of_the_embeddings(name: str, dtype: str, embeddings: Callable[[str, str], torch.Tensor]) -> None:
    found, truth = embeddings(name, dtype), embeddings(name, "fp32")
    least, largest = ERRORS[dtype]
    assert found.dtype == truth.dtype == torch.float32 and least < relative(found, truth) < largest
    assert (float(truth.abs().max()) > torch.finfo(torch.float16).max) == (name == "large")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_what_the_processor_is_fast_in(
    fast: bool,
    load: Callable[..., Any],
    folders: dict[str, Path],
    embeddings: Callable[[str, str], torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bonsai_ops.host import precision

    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: fast)
    with caplog.at_level("INFO"):
        clip = load(folders["random"])
    if load_device().type == "cpu":
        expected = "bf16" if fast else "fp32"
        assert f"multiplies in {'bfloat16' if fast else 'float32'}" in caplog.text
        assert torch.equal(encoded(clip), embeddings("random", expected))
    else:
        assert "multiplies in bfloat16" in caplog.text or "multiplies in float16" in caplog.text


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("options", "of_gpu", "of_cpu"),
    [
        (("bf16_text_enc",), torch.bfloat16, torch.bfloat16),
        (("fp16_text_enc",), torch.float16, torch.float16),
        (("fp32_text_enc",), torch.float32, torch.float32),
        (("force_fp16",), torch.float16, None),
        (("force_fp32",), torch.float32, torch.float32),
        (("fp8_e4m3fn_text_enc", "force_fp16"), torch.float16, None),
    ],
    ids=str,
)
def test_auto_follows_the_command_line(
    fast: bool,
    options: tuple[str, ...],
    of_gpu: torch.dtype,
    of_cpu: torch.dtype | None,
    comfy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None: what the processor is fast in. The node has the last word."""
    import comfy.model_management
    from comfy.cli_args import args

    from bonsai_ops.host import precision

    if load_device().type != "cpu" and options[-1].startswith("force"):
        pytest.skip("a GPU's own bf16 comes first")
    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: fast)
    for option in options:
        monkeypatch.setattr(args, option, True)
    monkeypatch.setattr(comfy.model_management, "FORCE_FP32", args.force_fp32)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert precision.text_dtype("auto", gpu) == of_gpu
    own = torch.bfloat16 if fast else torch.float32
    assert precision.text_dtype("auto", cpu) == (of_cpu or own)
    assert precision.text_dtype("fp32", gpu) == torch.float32
    assert precision.text_dtype("bf16", cpu) == torch.bfloat16


def test_a_clone_multiplies_in_the_same(
    load: Callable[..., Any], folders: dict[str, Path], embeddings: Callable[[str, str], torch.Tensor]
) -> None:
    clip = load(folders["random"], "bf16")
    function, arguments = clip.patcher.cached_patcher_init[:2]
    clip.patcher = function(*arguments, disable_dynamic=True)
    clip.cond_stage_model = clip.patcher.model
    assert torch.equal(encoded(clip), embeddings("random", "bf16"))


def test_text_is_generated_in_it_too(load: Callable[..., Any], folders: dict[str, Path]) -> None:
    """With all layers, the last of them read when text is asked for; so small an error leaves the words."""
    answers = [
        run_node(
            "comfy_extras.nodes_textgen.TextGenerate",
            clip=load(folders["random"], dtype),
            prompt=PROMPT,
            max_length=3,
            sampling_mode={"sampling_mode": "off"},
        )
        for dtype in ("fp32", "fp16")
    ]
    assert answers[0] == answers[1]


def test_an_unknown_one_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="compute_dtype 'best' is unknown, expected one of auto, bf16, fp16, fp32"):
        load(SEEDLING, "best")
