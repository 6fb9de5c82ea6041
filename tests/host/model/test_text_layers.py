"""A text encoder's layers on a CPU: attention to what is seen, the gated product in parts; the values are ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import relative

from bonsai_ops.tools import synthetic

pytestmark = [pytest.mark.host, pytest.mark.processor]

HIDDEN = torch.finfo(torch.float32).min / 4
"""What ComfyUI adds to the scores of what a token does not see; twice that where two reasons meet."""
SIZES = synthetic.TextGeometry(hidden=64, mlp=192, heads=4, key_heads=2, layers=29)
PROMPTS = ("a small tree in a blue pot", "tree " * 600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("text")
    synthetic.write_text_encoder(found, SIZES)
    return found


def clips(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The text encoder as it is loaded, and with ComfyUI's layers."""
    from comfy.cli_args import args

    from bonsai_ops.host import text_encoder

    monkeypatch.setattr(args, "cache_none", True)  # one file: what one has encoded would be the other's
    ours = text_encoder.load_bonsai_text_encoder(folder, compute_dtype=dtype)
    monkeypatch.setattr(text_encoder, "work_in_parts", lambda *_: None)
    return ours, text_encoder.load_bonsai_text_encoder(folder, compute_dtype=dtype)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_embeddings_are_those_of_comfyuis_layers(
    dtype: str, prompt: str, folder: Path, comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 but for the order of sums; in 16 bits, where that decides what is rounded up, no farther from fp32."""
    found, stock = (clip.encode_from_tokens(clip.tokenize(prompt)) for clip in clips(folder, dtype, monkeypatch))
    monkeypatch.undo()
    ours, truth = (clip.encode_from_tokens(clip.tokenize(prompt)) for clip in clips(folder, "fp32", monkeypatch))
    assert found.shape == truth.shape == (1, 512, 3 * SIZES.hidden)
    assert relative(ours, truth) < 1e-6
    assert 0 < relative(found, truth) < 1.1 * relative(stock, truth)


def test_keys_of_padding_are_left_out(folder: Path, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bonsai_ops.host import text_layers

    ours, stock = clips(folder, "fp32", monkeypatch)
    sizes: list[tuple[int, int]] = []
    attend = text_layers.attend_to_the_seen

    def noting(attention: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        def noted(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            sizes.append((query.shape[2], key.shape[2]))
            return attention(query, key, *rest, **options)

        return attend(noted, *args, **kwargs)

    monkeypatch.setattr(text_layers, "attend_to_the_seen", noting)
    tokens = ours.tokenize(PROMPTS[0])
    real = sum(token != 151643 for token, *_ in tokens["qwen3_4b"][0])
    ours.encode_from_tokens(tokens)
    assert 10 < real < 40 and set(sizes) == {(128, real)} and len(sizes) == 4 * 27
    sizes.clear()
    ours.encode_from_tokens(ours.tokenize(PROMPTS[1]))
    assert set(sizes) == {(128, 128), (128, 256), (128, 384), (128, 512)}
    sizes.clear()
    stock.encode_from_tokens(tokens)
    assert not sizes


def visible(kind: str, tokens: int, keys: int) -> torch.Tensor:
    """bool [B, 1, tokens, keys]: which query sees which key."""
    causal = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    if kind == "causal":
        return causal[None, None]
    lengths = {"padded": [37], "two prompts": [37, 300], "padded on the left": [-37]}[kind]
    places = torch.arange(keys)
    real = torch.stack([places < n if n > 0 else places >= -n for n in lengths])
    return causal & real[:, None, None]


@pytest.mark.parametrize("name", ["attention_basic", "attention_pytorch", "attention_sub_quad"])
@pytest.mark.parametrize("hidden", [HIDDEN, 2 * HIDDEN, -torch.inf])
@pytest.mark.parametrize(
    ("kind", "tokens", "keys", "calls"),
    [
        ("causal", 300, 300, [128, 256, 300]),
        ("causal", 60, 200, [200]),
        ("padded", 300, 300, [37, 37, 37]),
        ("two prompts", 400, 400, [128, 256, 300, 300]),
        ("padded on the left", 200, 200, [200]),  # the first queries see nothing
    ],
)
def test_attention_against_float64(
    kind: str, tokens: int, keys: int, calls: list[int], hidden: float, name: str, comfy: Any
) -> None:
    from comfy.ldm.modules import attention as comfys

    from bonsai_ops.host.text_layers import attend_to_the_seen

    seen = visible(kind, tokens, keys)
    batch, heads, width = len(seen), 4, 32
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(batch, heads, n, width, generator=generator) for n in (tokens, keys, keys))
    mask = torch.zeros(seen.shape).masked_fill(~seen, hidden)
    lengths: list[int] = []

    def noting(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(key.shape[2])
        return getattr(comfys, name)(query, key, *args, **kwargs)

    found = attend_to_the_seen(noting, q, k, v, heads, mask=mask, skip_reshape=True)
    scores = (q.double() @ k.double().mT / width**0.5).masked_fill(~seen, -torch.inf)
    truth = (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)
    some = seen.any(-1)[:, 0]
    assert relative(found[some], truth[some]) < 1e-6 and lengths == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_product_is_the_same_to_the_bit(dtype: torch.dtype, comfy: Any) -> None:
    """Of ComfyUI's module, in whose place it stands, and with its gradient."""
    from comfy.text_encoders.llama import MLP, Qwen3_4BConfig

    from bonsai_ops.host.precision import make_text_ops
    from bonsai_ops.host.text_layers import GatedProduct

    generator = torch.Generator().manual_seed(0)
    config = Qwen3_4BConfig(hidden_size=96, intermediate_size=3000)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    whole = MLP(config, dtype=torch.float32, ops=make_text_ops(name))
    shapes = {"gate_proj": (3000, 96), "up_proj": (3000, 96), "down_proj": (96, 3000)}
    state = {f"{n}.weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5 for n, shape in shapes.items()}
    whole.load_state_dict(state)
    ours = GatedProduct(whole, lambda _: dtype)
    assert set(ours.state_dict()) == set(state)
    x = torch.randn(2, 130, 96, generator=generator)
    with torch.no_grad():
        found, truth = ours(x), whole(x)
    assert found.dtype == torch.float32 and torch.equal(found, truth)
    grads = []
    for module in (ours, whole):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
