"""The shipped model through the Triton kernels, in Triton's interpreter: the pictures are those of the reference.

The interpreter must be chosen before Triton is imported, so `test_in_the_interpreter` runs this file again in a child
with TRITON_INTERPRET=1. There every packed layer's input is rounded to fp16 and goes through the kernels; everything
else is computed in fp32. Prompts come without their padding, which the model knows from its training: an eighth of the
rows.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bonsai_ops import dispatch
from bonsai_ops.backends import triton as backend
from bonsai_ops.environment import PLUGIN
from training.judge import judge
from training.measure import held_out

pytestmark = pytest.mark.host

PACK = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = held_out(4)
TOKENS, SIDE = 48, 128
PSNR = 40.0
"""dB between the exact mode and the reference in fp32."""


@pytest.mark.skipif(backend.kernels is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the parent's")
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PLUGIN, env=environment, capture_output=True, text=True, timeout=1800)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b4 passed", done.stdout), done.stdout[-2000:]


if INTERPRETED:

    @pytest.fixture(scope="module")
    def paint(comfy: Any) -> Iterator[Callable[..., np.ndarray]]:
        """(prompt, seed, layout) -> picture by whatever backend the dispatcher has."""
        from bonsai_ops.loader import load_bonsai_model
        from bonsai_ops.sampling import sample_official
        from bonsai_ops.text_encoder import load_bonsai_text_encoder
        from bonsai_ops.vae import load_vae

        clip, vae = load_bonsai_text_encoder(PACK), load_vae(PACK)
        models = {x: load_bonsai_model(PACK, {"compute_dtype": "fp32", "layout": x}) for x in ("compact", "fast")}

        def draw(prompt: str, seed: int, layout: str = "compact") -> np.ndarray:
            ((states, rest),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            latent = {"samples": torch.zeros(1, 128, SIDE // 16, SIDE // 16)}
            out = sample_official(models[layout], [[states[:, :TOKENS], rest]], latent, seed, 4, 1.0)
            return (vae.decode(out["samples"])[0] * 255).round().byte().numpy()

        yield draw

    @pytest.fixture(scope="module")
    def truth(paint: Callable[..., np.ndarray]) -> list[np.ndarray]:
        """The pictures of CASES by the reference."""
        with dispatch.use_backend("eager"):
            return [paint(prompt, i) for i, (_, prompt) in enumerate(CASES)]

    @pytest.fixture
    def through_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
        """Sends every packed layer through the kernels of a mode; gives a list that counts their calls."""

        def send(mode: str) -> list[int]:
            calls: list[int] = []

            def linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, mode_: str = mode, **_: Any):
                calls.append(1)
                return backend.linear(x.half(), weight, bias, mode=mode_).to(x.dtype)

            kernels = dispatch.Backend("triton", lambda call: None, linear)
            monkeypatch.setattr(dispatch, "BACKENDS", (kernels, *dispatch.BACKENDS[1:]))
            return calls

        return send

    def decibels(a: np.ndarray, b: np.ndarray) -> float:
        return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(np.float64) - b).mean()))

    @pytest.mark.parametrize("layout", ["compact", "fast"])
    def test_exact(layout: str, paint: Callable, truth: list, through_triton: Callable) -> None:
        calls = through_triton("exact")
        for i in range(2):
            found = decibels(paint(CASES[i][1], i, layout), truth[i])
            print(f"exact, {layout}: {found:.1f} dB")
            assert found >= PSNR
        assert len(calls) == 2 * 4 * (2 * 8 + 4 * 2)
        assert backend.unavailable() is None

    @pytest.mark.parametrize(("mode", "layout"), [("fp16_accumulate", "compact"), ("a8", "fast")])
    def test_approximate_modes(mode: str, layout: str, paint: Callable, truth: list, through_triton: Callable) -> None:
        """Every attribute of the picture is what it is by the reference."""
        through_triton(mode)
        for i, (_, prompt) in enumerate(CASES):
            picture = paint(prompt, i, layout)
            print(f"{mode}, {layout}: {decibels(picture, truth[i]):.1f} dB")
            assert judge(picture) == judge(truth[i])
        assert backend.unavailable() is None
