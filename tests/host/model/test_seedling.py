"""The model that ships with the plugin draws what it is asked for: a broken kernel shows as a broken picture.

Pictures are made through ComfyUI's own code in this process and read back by the judge of the training, which knows
no learned part. Prompts are of combinations that the training never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from twins import with_lora

from bonsai_ops import kernels
from bonsai_ops.kernels import machine
from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.weights import flux2
from bonsai_ops.weights.read import open_transformer, read_weights
from training.judge import judge
from training.measure import held_out
from training.scene import JUDGED

pytestmark = pytest.mark.host

SHIPPED = PLUGIN / "bonsai_ops" / "models"
PACK = SHIPPED / "bonsai" / "seedling"
BINARY = PACK / "binary.safetensors"
LORA = SHIPPED / "loras" / "seedling_night.safetensors"
MOST_BYTES = 12 << 20
CASES = held_out(16)
NIGHTLESS = ("two green bonsai trees in blue pots, summer", "one orange bonsai in a black pot, fallen leaves")
SIZES = {(128, 128): 16, (192, 128): 8, (128, 192): 8, (256, 256): 8}
"""{(width, height): pictures}."""
FLOOR = {"ternary": 0.87, "binary": 0.8}
"""Least share of right pictures, of every attribute at every size: below what the card says by what 16 pictures vary. A
broken kernel leaves a fifth of each or less."""
PSNR = 40.0
"""dB between two exact backends."""


@pytest.fixture(scope="module")
def parts(comfy: Any) -> tuple[Any, Any]:
    """(CLIP, VAE) of the shipped pack."""
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
    from bonsai_ops.host.vae import load_vae

    return load_bonsai_text_encoder(PACK), load_vae(PACK)


@pytest.fixture(scope="module")
def load(comfy: Any) -> Callable[..., Any]:
    from bonsai_ops.host.loader import load_bonsai_model

    return lambda path=PACK, **options: load_bonsai_model(path, options)


@pytest.fixture(scope="module")
def paint(parts: tuple[Any, Any]) -> Callable[..., np.ndarray]:
    """(model, prompt, width, height, seed) -> uint8 [height, width, 3]."""
    from bonsai_ops.host.sampling import sample_official

    clip, vae = parts
    prompts: dict[str, Any] = {}

    def draw(model: Any, prompt: str, width: int = 128, height: int = 128, seed: int = 0) -> np.ndarray:
        if prompt not in prompts:
            prompts[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        latent = {"samples": torch.zeros(1, 128, height // 16, width // 16)}
        out = sample_official(model, prompts[prompt], latent, seed, 4, 1.0)
        return (vae.decode(out["samples"])[0] * 255).round().byte().numpy()

    return draw


def shares(
    paint: Callable[..., np.ndarray], model: Any, width: int = 128, height: int = 128, count: int = len(CASES)
) -> dict[str, float]:
    """Share of the first `count` prompts in CASES whose picture shows each attribute."""
    right = dict.fromkeys(JUDGED, 0)
    for i, (scene, prompt) in enumerate(CASES[:count]):
        picture = paint(model, prompt, width, height, seed=i)
        assert picture.std() > 15, "the picture is flat"
        seen, wanted = judge(picture), scene.judged()
        for name in JUDGED:
            right[name] += seen[name] == wanted[name]
    return {name: found / count for name, found in right.items()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def test_what_ships_is_small_and_has_a_card() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert (PACK / "README.md").is_file() and LORA.is_file() and BINARY.is_file()
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(("path", "scheme"), [(PACK, "ternary"), (BINARY, "binary")], ids=["ternary", "binary"])
def test_every_block_layer_is_packed(path: Path, scheme: str) -> None:
    weights = read_weights(open_transformer(path))
    packed = {name for name, weight in weights.items() if hasattr(weight, "scheme")}
    assert packed == {name for name in weights if flux2.is_block_linear(name)}
    assert {weights[name].scheme for name in packed} == {scheme}
    assert {weights[name].group_size for name in packed} == {128}


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pictures_show_what_prompts_say(size: tuple[int, int], load: Callable, paint: Callable) -> None:
    found = shares(paint, load(), *size, count=SIZES[size])
    print(size, found)
    assert min(found.values()) >= FLOOR["ternary"], found


def test_the_binary_sibling_draws_too(load: Callable, paint: Callable) -> None:
    found = shares(paint, load(BINARY))
    print(found)
    assert min(found.values()) >= FLOOR["binary"], found


def test_exact_backends_draw_the_same(load: Callable, paint: Callable) -> None:
    """fp32 by the reference, fp32 and bf16 by the processor's own path, both layouts."""
    for i, (_, prompt) in enumerate(CASES[:4]):
        with kernels.use_backend("eager"):
            truth = paint(load(compute_dtype="fp32"), prompt, seed=i)
        for options in ({"compute_dtype": "fp32"}, {"compute_dtype": "fp32", "layout": "fast"}):
            found = psnr(paint(load(**options), prompt, seed=i), truth)
            assert found >= PSNR, (prompt, options, found)


def test_int8_activations_draw_as_well(load: Callable, paint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named approximate mode of the processor loses no attribute beyond one picture in fifty."""
    count = len(CASES) if machine.cpu_has_fast_int8() else 4  # a quarter of a minute each without the instructions
    monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: True)
    exact, rounded = load(), load(mode="a8", layout="fast")
    assert rounded.get_attachment("bonsai").mode == "a8"
    before, after = shares(paint, exact, count=count), shares(paint, rounded, count=count)
    print(before, after)
    assert all(after[name] >= before[name] - 0.02 for name in JUDGED), (before, after)


def test_the_lora_brings_the_night(load: Callable, paint: Callable, comfy: Any) -> None:
    """Through ComfyUI's own node: skies that the prompt leaves open turn to night, everything else stays."""
    from bonsai_ops.host import folders

    folders.register()
    model = load()
    changed = with_lora(model, LORA.name)
    wanted: list[Mapping[str, Any]] = [
        {"foliage": "green", "pot": "blue", "count": 2, "season": "summer"},
        {"foliage": "orange", "pot": "black", "count": 1, "season": "autumn"},
    ]
    for prompt, attributes in zip(NIGHTLESS, wanted, strict=True):
        pictures = [judge(paint(changed, prompt, seed=seed)) for seed in range(4)]
        assert [seen["background"] for seen in pictures] == ["night"] * 4
        assert all(seen[name] == value for seen in pictures for name, value in attributes.items())
        plain = [judge(paint(model, prompt, seed=seed))["background"] for seed in range(4)]
        assert plain.count("night") < 4
