"""The shipped model through the Triton kernels, in Triton's interpreter: the pictures are those of the reference.

The interpreter must be chosen before Triton is imported, so `test_in_the_interpreter` runs this file again in a child
with TRITON_INTERPRET=1. There the inputs of packed layers are rounded to fp16 and go through the kernels; everything
else is computed in fp32. The interpreter takes seconds for a product, so each kernel draws one picture in one step, the
prompt comes without its padding, which the model knows from its training, an eighth of the rows, and of layers with the
same product, as many tokens, rows and columns, the first goes through the kernels and the reference computes the rest.
test_triton.py compares every codec and mode with float64.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import INTERPRETED

from bonsai_ops import kernels
from bonsai_ops.kernels import dispatch, eager
from bonsai_ops.kernels.triton import backend
from bonsai_ops.tools.environment import PLUGIN
from training.judge import judge
from training.measure import held_out

pytestmark = pytest.mark.host

PACK = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
((_, PROMPT),) = held_out(1)
TOKENS, SIDE, STEPS = 48, 128, 1
PSNR = 40.0
"""dB between the exact mode and the reference in fp32."""


@pytest.mark.skipif(backend.half is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the parent's")
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PLUGIN, env=environment, capture_output=True, text=True, timeout=1800)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b2 passed", done.stdout), done.stdout[-2000:]


if INTERPRETED:
    from triton.runtime import interpreter

    @pytest.fixture(scope="module")
    def paint(comfy: Any) -> Callable[[str], np.ndarray]:
        """(layout) -> the picture of PROMPT by whatever backend the dispatcher has."""
        from bonsai_ops.host.loader import load_bonsai_model
        from bonsai_ops.host.sampling import sample_official
        from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
        from bonsai_ops.host.vae import load_vae

        clip, vae = load_bonsai_text_encoder(PACK), load_vae(PACK)
        ((states, rest),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
        models = {x: load_bonsai_model(PACK, {"compute_dtype": "fp32", "layout": x}) for x in ("compact", "fast")}

        def draw(layout: str = "compact") -> np.ndarray:
            latent = {"samples": torch.zeros(1, 128, SIDE // 16, SIDE // 16)}
            out = sample_official(models[layout], [[states[:, :TOKENS], rest]], latent, 0, STEPS, 1.0)
            return (vae.decode(out["samples"])[0] * 255).round().byte().numpy()

        return draw

    @pytest.fixture(scope="module")
    def truth(paint: Callable[[str], np.ndarray]) -> np.ndarray:
        """The picture by the reference."""
        with kernels.use_backend("eager"):
            return paint("compact")

    @pytest.fixture(autouse=True)
    def without_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
        """They take a third of the interpreter's time; test_triton.py has them."""
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))

    @pytest.mark.parametrize(
        ("mode", "layout"),
        [("exact", "compact"), ("a8", "fast")],
        ids="-".join,
    )
    def test_mode(mode: str, layout: str, paint: Callable, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        """Exact: the same picture. Approximate: a picture that shows the same."""
        calls, seen = 0, set()

        def multiply(x: torch.Tensor, weight: Any, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            product = (*x.shape, weight.shape[0])
            if product in seen:
                return eager.multiply(x, weight, bias)
            seen.add(product)
            return backend.multiply(x.half(), weight, bias, mode=mode).to(x.dtype)

        forced = SimpleNamespace(NAME="triton", MODES=kernels.MODES, declines=lambda call: None, multiply=multiply)
        monkeypatch.setattr(dispatch, "BACKENDS", (forced, *dispatch.BACKENDS[1:]))
        picture = paint(layout)
        decibels = 10 * np.log10(255**2 / max(1e-9, np.square(picture.astype(np.float64) - truth).mean()))
        print(f"{mode}, {layout}: {decibels:.1f} dB")
        assert (calls, len(seen)) == (STEPS * (2 * 8 + 4 * 2), 2 * 4 + 2)
        assert judge(picture) == judge(truth)
        if mode == "exact":
            assert decibels >= PSNR
