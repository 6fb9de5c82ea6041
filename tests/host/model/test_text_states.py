"""A prompt is encoded once, and never kept where something else would come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resident import resident

from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.weights.mapped import SMAPS

pytestmark = pytest.mark.host

SEEDLING = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"


@pytest.fixture
def clip(comfy: Any) -> Any:
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    return load_bonsai_text_encoder(SEEDLING)


@pytest.fixture
def encoded(clip: Any) -> Iterator[Callable[..., list]]:
    """(text, CLIP) -> conditioning; `encoded.calls` counts how often the model ran."""

    def encode(text: str, other: Any = None) -> list:
        asked = clip if other is None else other
        return asked.encode_from_tokens_scheduled(asked.tokenize(text))

    encode.calls = 0

    def count(*_: object) -> None:
        encode.calls += 1

    handle = clip.cond_stage_model.qwen3_4b.transformer.register_forward_pre_hook(count)
    yield encode
    handle.remove()


def test_changed_and_changed_back(encoded: Callable[..., list]) -> None:
    ((first, rest),) = encoded("a red tree")
    ((other, _),) = encoded("a blue pot")
    ((again, rest_again),) = encoded("a red tree")
    assert encoded.calls == 2
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert rest.keys() == rest_again.keys()


def test_nodes_may_change_what_they_get(encoded: Callable[..., list]) -> None:
    ((first, rest),) = encoded("a red tree")
    truth = first.clone()
    first.zero_()
    rest["guidance"] = 3.5
    for _ in range(2):
        ((again, rest_again),) = encoded("a red tree")
        assert torch.equal(again, truth) and "guidance" not in rest_again
        again.zero_()
    assert encoded.calls == 1


def test_another_weight_of_a_word_is_another_prompt(clip: Any, encoded: Callable[..., list]) -> None:
    tokens = clip.tokenize("a red tree")
    clip.encode_from_tokens_scheduled(tokens)
    tokens["qwen3_4b"][0][-1] = (tokens["qwen3_4b"][0][-1][0], 1.5)
    clip.encode_from_tokens_scheduled(tokens)
    assert encoded.calls == 2


def test_clones_and_what_they_carry_are_encoded_anew(clip: Any, encoded: Callable[..., list]) -> None:
    """A node that changes the text encoder works on a clone; a layer set on the loader's own counts too."""
    encoded("a red tree")
    clone = clip.clone()
    name = next(key for key in clip.patcher.model_state_dict() if key.endswith("layers.3.input_layernorm.weight"))
    shape = clip.patcher.model.state_dict()[name].shape
    clone.add_patches({name: ("diff", (torch.ones(shape),))}, 0.5)
    ((changed, _),) = encoded("a red tree", clone)
    ((plain, _),) = encoded("a red tree")
    assert encoded.calls == 2 and not torch.equal(changed, plain)
    clip.patcher.add_patches({name: ("diff", (torch.ones(shape),))}, 0.5)
    try:
        ((patched, _),) = encoded("a red tree")
    finally:
        clip.patcher.patches.clear()
        clip.patcher.patches_uuid = clone.patcher.clone().patches_uuid
    assert encoded.calls == 3 and torch.equal(patched, changed)


def test_inversions_are_not_kept(clip: Any, encoded: Callable[..., list]) -> None:
    """A token that is a tensor is known by its address alone."""
    width = clip.cond_stage_model.qwen3_4b.transformer.get_input_embeddings().weight.shape[1]
    tokens = clip.tokenize("a red tree")
    tokens["qwen3_4b"][0][0] = (torch.zeros(width), 1.0)
    for _ in range(2):
        clip.encode_from_tokens(tokens)
    assert encoded.calls == 2


def test_nothing_is_kept_where_that_is_asked_for(
    clip: Any, encoded: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "cache_none", True)
    encoded("a red tree")
    encoded("a red tree")
    assert encoded.calls == 2


def test_the_oldest_leaves_at_the_limit(comfy: Any) -> None:
    from bonsai_ops.host.text_states import TextStates

    states = TextStates(limit=3000)
    for name in "abc":
        states.put(name, {"cond": torch.zeros(250), "rest": [torch.zeros(1)]})
    assert states.nbytes == 2 * 1004 and states.get("a") is None and states.get("b") is not None
    states.put("d", torch.zeros(250))
    assert states.get("c") is None and states.get("b") is not None
    states.put("large", torch.zeros(1000))
    assert states.get("large") is None and states.get("d") is not None


def test_a_mapped_encoder_leaves_memory_after_a_prompt(comfy: Any, tmp_path: Path) -> None:
    """Its pages are read again for the next prompt, which is encoded as in a process that never gave them back."""
    from bonsai_ops import convert
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    file = tmp_path / "encoder.safetensors"
    assert convert.main([str(SEEDLING / "text_encoder-mlx-4bit"), str(file)]) == 0
    clip, repacked = load_bonsai_text_encoder(file), load_bonsai_text_encoder(SEEDLING)
    if clip.patcher.load_device.type != "cpu" or not SMAPS.is_file():
        pytest.skip("only a CPU under Linux gives pages back")
    read = []
    model = clip.cond_stage_model.qwen3_4b.transformer
    handle = model.register_forward_hook(lambda *_: read.append(resident(file)))
    for text in ("a red tree", "a blue pot"):
        ((found, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        ((expected, _),) = repacked.encode_from_tokens_scheduled(repacked.tokenize(text))
        assert torch.equal(found, expected)
        assert resident(file) < read[-1] / 8
    handle.remove()
    assert read[1] > file.stat().st_size / 8
