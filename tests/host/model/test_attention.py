"""On a CPU our models attend in parts: the same to the bit, and only where ComfyUI's sub-quadratic attention runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import KINDS, patch, sample, stock
from twins import draw, load_stock, read_dense, relative, run_node

pytestmark = [pytest.mark.host, pytest.mark.processor]

PLACE = ("transformer_options", "optimized_attention_override")


@pytest.fixture
def model(comfy: Any, packs: Mapping[str, Path]) -> Any:
    from bonsai_ops.host.loader import load_bonsai_model

    return load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32"})


@pytest.fixture
def calls(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(batch x heads, queries) of whatever ComfyUI's sub-quadratic attention computes."""
    from comfy.ldm.modules import attention as comfys

    shapes: list[tuple[int, int]] = []
    compute = comfys.efficient_dot_product_attention

    def noting(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append((query.shape[0], query.shape[1]))
        return compute(query, *args, **kwargs)

    monkeypatch.setattr(comfys, "efficient_dot_product_attention", noting)
    return shapes


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, comfy: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(batch: int, heads: int, tokens: int, keys: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value [batch, heads, tokens or keys, width]."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, heads, n, width, generator=generator).to(dtype) for n in (tokens, keys, keys)]


@pytest.mark.parametrize(
    ("shape", "score_bytes", "largest", "dtype"),
    [
        # batch, heads, queries, keys, width; largest: heads x queries of the largest part. The first two, of real size,
        # take a minute in bf16, in which a CPU computes on request only
        ((1, 24, 1536, 1536, 128), 8_000_000, (1, 1536), torch.float32),
        ((1, 2, 4608, 4608, 128), 8_000_000, (1, 768), torch.float32),
        *(
            (*case, dtype)
            for case in (
                ((1, 5, 96, 96, 64), 20_000, (1, 96)),
                ((1, 5, 96, 96, 64), 40_000, (2, 96)),
                ((2, 3, 333, 333, 128), 200_000, (1, 111)),
                ((1, 4, 193, 150, 32), 1, (1, 65)),
                ((1, 4, 33, 700, 32), 1, (1, 33)),
                ((1, 24, 513, 1031, 128), 500_000, (1, 171)),
            )
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_the_same_to_the_bit(
    shape: tuple[int, ...],
    score_bytes: int,
    largest: tuple[int, int],
    dtype: torch.dtype,
    threads: int,
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against ComfyUI's function called once, in both of its layouts. score_bytes: for two bytes a score."""
    from bonsai_ops.host import attention

    batch, heads, tokens, _, _ = shape
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes * dtype.itemsize // 2)
    tensors = inputs(*shape, dtype)
    truth = attention.SUB_QUADRATIC(*tensors, heads, skip_reshape=True)
    assert calls == [(batch * heads, tokens)]
    calls.clear()
    assert torch.equal(attention.in_parts(attention.SUB_QUADRATIC, *tensors, heads, skip_reshape=True), truth)
    assert max(calls) == (batch * largest[0], largest[1]) and sum(h * n for h, n in calls) == batch * heads * tokens
    assert min(n for _, n in calls) >= min(tokens, attention.LEAST_QUERIES)
    flat = [t.transpose(1, 2).flatten(2) for t in tensors]
    assert torch.equal(attention.in_parts(attention.SUB_QUADRATIC, *flat, heads=heads), truth)
    flat[2] = flat[2].unflatten(-1, (heads, -1))  # as SD3 has them
    assert torch.equal(attention.in_parts(attention.SUB_QUADRATIC, *flat, heads=heads), truth)


def test_what_is_not_taken_apart(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.ldm.modules import attention as comfys

    from bonsai_ops.host import attention

    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    q, k, v = inputs(1, 4, 200, 200, 16, torch.float32)
    mask = torch.zeros(200, 200).masked_fill_(torch.ones(200, 200).triu(1).bool(), -torch.inf)
    for settings in ({"mask": mask}, {"skip_output_reshape": True}):
        truth = attention.SUB_QUADRATIC(q, k, v, 4, skip_reshape=True, **settings)
        found = attention.in_parts(attention.SUB_QUADRATIC, q, k, v, 4, skip_reshape=True, **settings)
        assert torch.equal(found, truth)
    assert calls == [(4, 200)] * 4
    for name in ("attention_pytorch", "attention_split"):
        function = inspect.unwrap(getattr(comfys, name))
        truth = function(q, k, v, 4, None, None, True)
        assert torch.equal(attention.in_parts(function, q, k, v, 4, None, None, True), truth)
    assert len(calls) == 4


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_gradients(flat: bool, scale: float | None, calls: list[tuple[int, int]]) -> None:
    """Against ComfyUI's function in fp64; of what is kept for the backward pass nothing has the size of the scores."""
    from bonsai_ops.host import attention

    heads, tokens = 4, 200
    q, k, v = inputs(2, heads, tokens, tokens, 16, torch.float64)
    if flat:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    options = {"skip_reshape": not flat} | ({} if scale is None else {"scale": scale})
    towards = torch.randn(2, tokens, heads * 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(function: Callable, *given: Any) -> tuple[torch.Tensor, ...]:
        wanted = [t.clone().requires_grad_() for t in (q, k, v)]
        y = function(*given, *wanted, heads, **options)
        return y.detach(), *torch.autograd.grad(y, wanted, towards)

    truth = gradients(attention.SUB_QUADRATIC)
    calls.clear()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = gradients(attention.in_parts, attention.SUB_QUADRATIC)
    assert calls == [] and kept and max(kept) <= q.numel() < heads * tokens * tokens
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_picture_drawn_in_parts(model: Any, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt and two at once; with a clone, as every loader of LoRAs makes one."""
    from bonsai_ops.host import attention

    start = {"samples": torch.zeros(1, 128, 16, 16)}
    whole = [draw(model, start=start, cfg=cfg) for cfg in (1.0, 3.0)]
    assert set(calls) == {(1, 768), (2, 768)}  # ComfyUI fills the text up to 512 tokens
    calls.clear()
    monkeypatch.setattr(attention, "SCORE_BYTES", 1000)
    found = [draw(model.clone(), start=start, cfg=cfg) for cfg in (1.0, 3.0)]
    assert set(calls) == {(1, 64), (2, 64)}
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind: str, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever shapes its queries, keys and values have: in parts it draws what it draws at once."""
    from bonsai_ops.host import attention

    with torch.inference_mode():
        patched, _ = patch(stock(kind))
        monkeypatch.setattr(attention, "SCORE_BYTES", 1 << 40)
        whole = sample(kind, patched)
        monkeypatch.setattr(attention, "SCORE_BYTES", 1)
        assert torch.equal(sample(kind, patched), whole)


def test_another_choice_stays(model: Any) -> None:
    """The override of another node is called, also on clones made after it was set; so is none at all."""

    def others(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(function.__name__)
        return function(*args, **kwargs)

    seen: list[str] = []
    clone = model.clone()
    options, name = PLACE
    clone.model_options[options][name] = others
    draw(clone.clone(), steps=1)
    assert seen
    del clone.model_options[options][name]
    assert name not in clone.clone().model_options[options]


def test_only_packed_models_on_a_cpu(model: Any, packs: Mapping[str, Path]) -> None:
    from bonsai_ops.host import attention

    options, name = PLACE
    assert model.model_options[options][name] is attention.in_parts
    assert model.clone().model_options[options][name] is attention.in_parts
    stock = load_stock(read_dense(packs["ternary"]))
    assert name not in stock.model_options[options]
    stock.load_device = torch.device("cuda")
    attention.attend_in_parts(stock)
    assert name not in stock.model_options[options]


def test_a_dense_model_that_is_to_be_trained(comfy: Any, packs: Mapping[str, Path]) -> None:
    """Behind Right Gradients for Training it attends as ours, draws the same, and keeps a choice of another node."""
    from bonsai_ops.host import attention
    from bonsai_ops.host.gradients import with_right_gradients

    options, name = PLACE
    stock = load_stock(read_dense(packs["ternary"]))
    trained = with_right_gradients(stock)
    assert trained.model_options[options][name] is attention.in_parts
    assert name not in stock.model_options[options]
    assert torch.equal(draw(trained, steps=1), draw(stock, steps=1))
    chosen = with_backend(stock)
    assert with_right_gradients(chosen).model_options[options][name] is chosen.model_options[options][name]


BACKEND = "comfy_extras.nodes_model_advanced.ModelAttentionBackend"


def with_backend(model: Any) -> Any:
    """The model behind ComfyUI's Model Attention Backend, or behind what a pack with such a node sets."""
    import comfy_extras.nodes_model_advanced as advanced
    from comfy.ldm.modules import attention as comfys

    if hasattr(advanced, "ModelAttentionBackend"):
        return run_node(BACKEND, model=model, attention="pytorch attention")
    options, name = PLACE
    model = model.clone()
    model.model_options[options][name] = lambda _, *args, **kwargs: comfys.attention_pytorch(*args, **kwargs)
    return model


@pytest.mark.parametrize("order", ["loaded first", "patched after", "cloned", "made again", "saved"])
def test_the_node_for_the_attention_wins(
    model: Any, packs: Mapping[str, Path], calls: list[tuple[int, int]], order: str, tmp_path: Path
) -> None:
    """Before or behind what makes a model ours, on clones and on what ComfyUI makes again; a file holds no choice."""
    from bonsai_ops.host import attention
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.save import save_bonsai_model

    options, name = PLACE
    chosen, ours = with_backend(model), False
    plain = draw(model, steps=1)
    assert calls and model.model_options[options][name] is attention.in_parts
    if order == "patched after":
        stock = load_stock(read_dense(packs["ternary"]))
        chosen, _ = patch(with_backend(stock))
        assert name not in stock.model_options[options]
    elif order == "cloned":
        chosen = chosen.clone().clone()
    elif order == "made again":
        try:
            chosen = chosen.clone(disable_dynamic=True)
        except TypeError:
            pytest.skip("this ComfyUI makes no model again")
    elif order == "saved":
        save_bonsai_model(chosen, tmp_path / "model.safetensors")
        chosen, ours = load_bonsai_model(tmp_path / "model.safetensors", {"compute_dtype": "fp32"}), True
    assert (chosen.model_options[options][name] is attention.in_parts) == ours
    calls.clear()
    drawn = draw(chosen, steps=1)
    assert bool(calls) == ours
    assert order == "patched after" or relative(drawn, plain) < 1e-5
