"""A prompt is encoded once, and never kept where something else would come out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resident import resident
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from twins import load_device, run_node

from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.weights.mapped import SMAPS

pytestmark = pytest.mark.host

SEEDLING = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
FILE = SEEDLING / "text_encoder-mlx-4bit" / "model.safetensors"


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


def difference(clip: Any) -> dict[str, tuple]:
    """A patch that changes what it encodes."""
    name = next(key for key in clip.patcher.model_state_dict() if key.endswith("layers.3.input_layernorm.weight"))
    return {name: ("diff", (torch.ones(clip.patcher.model.state_dict()[name].shape),))}


def test_what_a_clone_carries_is_encoded_anew(clip: Any, encoded: Callable[..., list]) -> None:
    """A node that changes the text encoder works on a clone; a patch on the loader's own counts too."""
    encoded("a red tree")
    clone = clip.clone()
    clone.add_patches(difference(clip), 0.5)
    ((changed, _),) = encoded("a red tree", clone)
    ((plain, _),) = encoded("a red tree")
    assert encoded.calls == 2 and not torch.equal(changed, plain)
    assert torch.equal(encoded("a red tree", clone.clone())[0][0], changed) and encoded.calls == 3
    clip.patcher.add_patches(difference(clip), 0.5)
    ((patched, _),) = encoded("a red tree")
    assert encoded.calls == 4 and torch.equal(patched, changed)
    clip.patcher.patches.clear()
    assert torch.equal(encoded("a red tree")[0][0], plain) and encoded.calls == 4


def with_hooks(clip: Any, *, apply_to_conds: bool) -> Any:
    import comfy.hooks

    weights = {name: tensor for name, (_, (tensor,)) in difference(clip).items()}
    hooks = comfy.hooks.create_hook_model_as_lora(None, weights, 0.0, 0.6)
    node = "comfy_extras.nodes_hooks.SetClipHooks"
    return run_node(node, clip=clip, hooks=hooks, apply_to_conds=apply_to_conds, schedule_clip=False)


LAYER, ON_LOAD = "qwen3_4b.transformer.model.layers.3.mlp.up_proj.weight", "on_load_after"
CARRIED = {
    "wrapper": lambda clip: clip.patcher.add_weight_wrapper(LAYER, lambda weight: weight * 2),
    "object": lambda clip: clip.patcher.add_object_patch("qwen3_4b.logit_scale", torch.nn.Parameter(torch.zeros(()))),
    "callback": lambda clip: clip.patcher.add_callback(ON_LOAD, lambda *_: None),
    "injections": lambda clip: clip.patcher.set_injections("a", []),
    "hooks": lambda clip: with_hooks(clip, apply_to_conds=False),
    "hooks of the conditioning": lambda clip: with_hooks(clip, apply_to_conds=True),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_nothing_is_kept_of_what_may_change_it(kind: str, clip: Any, encoded: Callable[..., list]) -> None:
    encoded("a red tree")
    for _ in range(2):
        clone = clip.clone()
        encoded("a red tree", CARRIED[kind](clone) or clone)
    assert encoded.calls == 3
    encoded("a red tree")
    assert encoded.calls == 3


def test_a_clone_without_changes_is_the_same(clip: Any, encoded: Callable[..., list]) -> None:
    """What it encodes first is known to the loader's own, too; each layer that Set CLIP Last Layer asks for is its own.

    Load Bonsai Pack gives the same text encoder as Load Bonsai Text Encoder.
    """
    ((first, _),) = encoded("a red tree", clip.clone())
    ((same, _),) = encoded("a red tree", clip.clone().clone())
    assert encoded.calls == 1 and torch.equal(first, same)
    assert torch.equal(encoded("a red tree")[0][0], first) and encoded.calls == 1
    for layer, calls in ((-2, 2), (-2, 2), (-1, 3), (-2, 3)):
        encoded("a red tree", run_node("nodes.CLIPSetLastLayer", clip=clip, stop_at_clip_layer=layer))
        assert encoded.calls == calls


@pytest.fixture
def forwards(comfy: Any) -> Iterator[list[int]]:
    """An entry for every time that a text encoder's model ran, whichever."""
    from comfy.text_encoders.llama import Qwen3_4B

    found: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: found.append(1) if isinstance(module, Qwen3_4B) else None
    )
    yield found
    handle.remove()


def test_another_loader_of_the_same_file(forwards: list[int]) -> None:
    """A folder of a pack or its file; auto or the dtype that it means. Another dtype is encoded."""
    from bonsai_ops.host.precision import text_dtype
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    def encode(path: Path, dtype: str = "auto") -> torch.Tensor:
        clip = load_bonsai_text_encoder(path, compute_dtype=dtype)
        return clip.encode_from_tokens_scheduled(clip.tokenize("a red tree"))[0][0]

    meant = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[text_dtype("auto", load_device())]
    first = encode(SEEDLING)
    for path, dtype in ((FILE, "auto"), (SEEDLING, meant), (FILE.parent, meant)):
        assert torch.equal(encode(path, dtype), first) and len(forwards) == 1
    assert not torch.equal(encode(FILE, "fp16" if meant == "fp32" else "fp32"), first) and len(forwards) == 2


@pytest.mark.parametrize("loaded_before", [True, False], ids=["written over", "put in its place"])
def test_another_file_is_encoded(loaded_before: bool, forwards: list[int], tmp_path: Path) -> None:
    """With the same name, size and times of content; also with a text encoder that has it mapped."""
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    def encode(clip: Any) -> torch.Tensor:
        return clip.encode_from_tokens_scheduled(clip.tokenize("a red tree"))[0][0]

    file = tmp_path / "encoder.safetensors"
    shutil.copy2(FILE, file)
    status, other = file.stat(), load_file(file)
    before = load_bonsai_text_encoder(file)
    first = encode(before)
    other["model.layers.3.input_layernorm.weight"] *= 3
    with safe_open(file, "pt") as opened:
        save_file(other, tmp_path / "other.safetensors", opened.metadata())
    if loaded_before:
        file.write_bytes((tmp_path / "other.safetensors").read_bytes())
    else:
        (tmp_path / "other.safetensors").replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert not torch.equal(encode(load_bonsai_text_encoder(file)), first) and len(forwards) == 2
    encode(before)
    encode(before)
    assert len(forwards) == 4


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
