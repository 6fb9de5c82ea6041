"""Gradients through models whose blocks write into their inputs, at every depth of checkpoints of ComfyUI's Train LoRA.

The truth is the dense model in float64 without checkpoints, where PyTorch itself copies what is about to be written
into while a backward pass needs it (`allow_mutation_on_saved_tensors`), and for FLUX a difference quotient of that.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import families
import pytest
import torch
import torch._dynamo.testing
from families import CONTEXT, KINDS, POOLED, Kind, patch, stock
from lora_training import learned, put_right, right_twin, train_lora
from operators import Operators
from twins import LATENT, SMALL, Pair, relative, same_state, state_bytes

pytestmark = pytest.mark.host

DEPTHS = (0, 1, 2, 3)
"""Checkpoints: none, the whole transformer, its blocks, the layers of its blocks."""
TOLERANCE = 1e-5
LTX = Kind(
    "LTXV",
    {
        "image_model": "ltxv",
        "in_channels": 16,
        "cross_attention_dim": 128,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "caption_channels": CONTEXT,
        "num_layers": 2,
    },
    (1, 16, 1, 4, 4),
    "transformer_blocks.0.attn1.to_q",
    "proj_out",
    0,
)
ARCHITECTURES = (*KINDS, "ltx")
BONSAI = Kind("Flux2", {}, LATENT, "", "", 0)
"""The model of the fixtures, from a file."""
WIDTH = {"bonsai": SMALL.context}


@pytest.fixture(autouse=True)
def training(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while ComfyUI trains: no kernels without a backward pass."""
    monkeypatch.setitem(families.KINDS, "ltx", LTX)
    monkeypatch.setitem(families.KINDS, "bonsai", BONSAI)
    monkeypatch.setattr(comfy.model_management, "in_training", True)


def twin_of(kind: str, patched: Any) -> Any:
    """A stock model with the dequantized weights of a patched one."""
    from bonsai_ops.host.layout import is_packed
    from bonsai_ops.host.tensors import tensors_of

    weights = tensors_of(patched.model.diffusion_model)
    return stock(kind, {n: t.dequantize() if is_packed(t) else t.detach() for n, t in weights.items()})


def inputs_of(kind: str, model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of the transformer for a point between noise and picture, as ComfyUI makes them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(KINDS[kind].latent, generator=generator)
    states = torch.randn(1, 12, WIDTH.get(kind, CONTEXT), generator=generator)
    pooled = torch.randn(1, POOLED.get(kind, 8), generator=generator)
    known = {"cross_attn": states, "pooled_output": pooled, "guidance": 3.5, "frame_rate": 25}
    conditions = model.model.extra_conds(noise=x, device=x.device, **known)
    made = {name: c.process_cond(batch_size=1, device=x.device, area=None).cond for name, c in conditions.items()}
    made["context"] = made.pop("c_crossattn")
    if kind == "ltx":
        made.setdefault("attention_mask", None)
    made |= {"x": x, "timestep": model.model.model_sampling.timestep(torch.tensor([0.7])).float()}
    return {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in made.items()}


def loss_of(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """A scalar to which every value of the output counts differently."""
    inputs = dict(inputs)
    out = model.model.diffusion_model(inputs.pop("x"), inputs.pop("timestep"), **inputs, transformer_options={})
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return (out * weights).mean()


@contextlib.contextmanager
def checkpoints(model: Any, depth: int) -> Iterator[None]:
    """ComfyUI's checkpoints at this depth, 0 for none."""
    train = importlib.import_module("comfy_extras.nodes_train")
    modules = train.find_modules_at_depth(model.model.diffusion_model, depth=depth) if depth else []
    assert bool(modules) == bool(depth)
    for module in modules:
        train.patch(module)
    try:
        yield
    finally:
        for module in modules:
            train.unpatch(module)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of what is not packed."""
    from bonsai_ops.host.layout import is_packed

    named = model.model.diffusion_model.named_parameters()
    return {n: p for n, p in named if p.is_floating_point() and not is_packed(p)}


def gradients(
    kind: str, model: Any, depth: int, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, torch.Tensor]:
    """{input or parameter: its gradient}. more: further arguments of the transformer."""
    inputs = inputs_of(kind, model, dtype) | more
    leaves = {**trained(model), "x": inputs["x"], "context": inputs["context"]}
    for leaf in leaves.values():
        leaf.requires_grad_(True).grad = None
    with checkpoints(model, depth):
        loss_of(model, inputs).backward()
    found = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.requires_grad_(False).grad = None
    return found


def truth_of(kind: str, dense: Any, **more: Any) -> dict[str, torch.Tensor]:
    """The gradients of a stock model; it is in float64 afterwards."""
    dtype = torch.float64
    transformer = dense.model.diffusion_model.to(dtype)
    if kind == "wan":  # which casts to fp32 before its first layer
        embed = transformer.patch_embedding.forward
        transformer.patch_embedding.forward = lambda x: embed(x.double())
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        return gradients(kind, dense, 0, dtype, **more)


def distance(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> float:
    """Largest relative distance over the parameters of one kind of size: inputs, and all parameters together."""
    assert found.keys() <= truth.keys() and {"x", "context"} <= found.keys()
    parameters = sorted(found.keys() - {"x", "context"})
    assert parameters

    def together(which: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([which[name].double().flatten() for name in parameters])

    return max(relative(together(found), together(truth)), *(relative(found[n], truth[n]) for n in ("x", "context")))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind: str) -> None:
    """Dense behind our node and packed by Patch to BitLinear, at every depth."""
    dense, (patched, _) = put_right(stock(kind)), patch(stock(kind))  # which puts what it makes right by itself
    for model, truth in ((dense, truth_of(kind, stock(kind))), (patched, truth_of(kind, twin_of(kind, patched)))):
        for depth in DEPTHS:
            found = gradients(kind, model, depth)
            assert distance(found, truth) < TOLERANCE, depth
        assert set(found) == set(truth) or model is patched


def test_offloading_trains_what_reads_the_text(pair: Pair) -> None:
    """Train LoRA's checkpoint of a single layer passes on no gradient if the layer's input needs none."""
    options = {"bypass_mode": False, "checkpoint_depth": 2}
    for model in (right_twin(pair), pair.packed):
        start = train_lora(model, learning_rate=0.0, **options).lora
        wanted = learned(train_lora(model, **options).lora, start)
        found = train_lora(model, **options, offloading=True).lora
        assert relative(learned(found, start), wanted) < 1e-5
        names = [name for name in found if "txt_in" in name]
        assert names and any(not torch.equal(found[name], start[name]) for name in names)


def test_nothing_before_the_blocks_is_kept_for_them() -> None:
    """Recover BitLinear trains in blocks and checkpoints no single layer: of 4B the layers before them are 0.8 GB."""
    model = stock("flux2")
    put_right(model)
    transformer, inputs = model.model.diffusion_model, inputs_of("flux2", model)
    layers = {transformer.txt_in, transformer.time_in.in_layer, transformer.double_stream_modulation_img.lin}
    weights = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    wanted = transformer.single_blocks[-1].linear2.weight.requires_grad_()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, inputs)
    loss.backward()
    assert wanted.grad is not None and kept and not weights & set(kept)


@pytest.mark.parametrize("kind", ["flux", "flux2", "ltx"])
def test_comfyui_alone_is_wrong(kind: str) -> None:
    """As the help of our node says. A ComfyUI that fails here has repaired it: tell so there."""
    truth = truth_of(kind, stock(kind))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(kind, stock(kind), 0)
    for depth in (1, 2):
        assert distance(gradients(kind, stock(kind), depth), truth) > 0.01, depth


@pytest.mark.parametrize("kind", ["flux2", "ltx"])
def test_a_model_that_was_trained_before(kind: str) -> None:
    """Train LoRA leaves on every module that it checkpointed the forward of the class that the module had."""
    model = stock(kind)
    for depth in (1, 2):
        gradients(kind, model, depth)
    truth = truth_of(kind, stock(kind))
    put_right(model)
    assert all(distance(gradients(kind, model, depth), truth) < TOLERANCE for depth in DEPTHS)


def test_a_loaded_pack(pair: Pair) -> None:
    """And its clone, and the dense twin, whose loader is not ours, raises."""
    truth = truth_of("bonsai", copy.copy(pair.dense))
    for parameter in trained(pair.packed).values():
        parameter.data = parameter.data.float()  # gradients are as fine as what they belong to
    for model in (pair.packed, pair.packed.clone()):
        for depth in DEPTHS:
            assert distance(gradients("bonsai", model, depth), truth) < TOLERANCE, depth
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients("bonsai", pair.dense, 0, torch.float64)


@pytest.mark.parametrize("kind", ["flux", "flux2"])
def test_the_truth_is_that_of_differences(kind: str) -> None:
    """Along a random direction of all parameters, by Richardson's extrapolation; some of FLUX.1 stays in fp32."""
    dense = stock(kind)
    truth, inputs, places = truth_of(kind, dense), inputs_of(kind, dense, torch.float64), trained(dense)
    generator = torch.Generator().manual_seed(4)
    start = {name: place.detach().clone() for name, place in places.items()}
    way = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.std() for n, p in start.items()}

    def at(step: float) -> torch.Tensor:
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(start[name] + step * way[name])
            return loss_of(dense, inputs)

    first, second, third = ((at(step) - at(-step)) / (2 * step) for step in (1.5e-2, 3e-2, 6e-2))
    found = (16 * (4 * first - second) - (4 * second - third)) / 45
    assert relative(found, sum((truth[n] * way[n]).sum() for n in way if n in truth)) < TOLERANCE


@pytest.mark.parametrize("kind", ["flux", "flux2"])
def test_a_controlnet_adds_between_the_blocks(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    control = {name: [torch.randn(1, 16, 128, generator=generator)] for name in ("input", "output")}
    model = put_right(stock(kind))
    truth = truth_of(kind, stock(kind), control={n: [t.double() for t in ts] for n, ts in control.items()})
    assert distance(gradients(kind, model, 0), truth) > TOLERANCE
    for depth in DEPTHS:
        assert distance(gradients(kind, model, depth, control=control), truth) < TOLERANCE, depth


@pytest.mark.parametrize("kind", ["flux", "flux2", "sdxl", "ltx"])
def test_nothing_changes_without_gradients(kind: str) -> None:
    model = stock(kind)
    inputs = inputs_of(kind, model)

    def run(mode: Callable) -> tuple[torch.Tensor, list[str]]:
        with mode(), Operators() as operators:
            return loss_of(model, inputs), operators.names

    modes = (torch.no_grad, torch.inference_mode)
    before = [run(mode) for mode in modes]
    state = state_bytes(model)
    put_right(model)
    for mode, (loss, names) in zip(modes, before, strict=True):
        found, found_names = run(mode)
        assert torch.equal(found, loss) and found_names == names
    assert same_state(state_bytes(model), state)


def hooks_of(model: Any) -> list[int]:
    return [len(m._forward_pre_hooks) for m in model.model.modules()]


def test_only_this_model_and_only_once(pair: Pair, second_import: str) -> None:
    """Not the classes of ComfyUI, no second load by other means, no second class, and no hook once a block is done."""
    model = put_right(put_right(pair.packed.clone()).clone())
    block = model.model.diffusion_model.double_blocks[0]
    kind = type(block)
    importlib.import_module(f"{second_import}.host.gradients").right_gradients(model)
    assert type(block) is kind
    for which in (model, pair.dense):
        gradients("bonsai", which, 2)
        assert max(hooks_of(which)) == 0
    stock_kind = type(pair.dense.model.diffusion_model.double_blocks[0])
    assert isinstance(block, stock_kind) and kind.__name__ == stock_kind.__name__
    assert stock_kind.__module__.startswith("comfy.") and "_forward_pre_hooks" not in vars(stock_kind)


def test_a_copy_of_the_transformer_is_right_too() -> None:
    model = put_right(stock("flux2"))
    truth = truth_of("flux2", stock("flux2"))
    transformer = model.model.diffusion_model
    for made in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        model.model.diffusion_model = made
        assert made is not transformer
        assert all(distance(gradients("flux2", model, d), truth) < TOLERANCE for d in (0, 2))


def plain_attention(function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any):
    """ComfyUI's own for a CPU asks for the free memory, which the compiler cannot."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("gradient", [False, True])
def test_no_graph_break(gradient: bool) -> None:
    model, plain = (m.model.diffusion_model for m in (put_right(stock("flux2")), stock("flux2")))
    x, vec = torch.randn(2, 1, 16, 128, generator=torch.Generator().manual_seed(1))
    pe = model.pe_embedder(torch.zeros(1, 16, 4))
    options = {"optimized_attention_override": plain_attention}
    torch._dynamo.reset()
    compiled = torch.compile(model.single_blocks[0], fullgraph=True, backend="eager")
    with torch.set_grad_enabled(gradient):
        given = x.clone().requires_grad_(gradient)
        modulation, _ = model.single_stream_modulation(vec[:, 0])
        found = compiled(given * 1, vec=modulation, pe=pe, transformer_options=options)
        truth = plain.single_blocks[0](x.clone(), vec=modulation, pe=pe, transformer_options=options)
    assert relative(found, truth) < 1e-6
    torch._dynamo.reset()


def test_each_kind_of_block_is_compiled_on_its_own() -> None:
    """What torch.compile made of one kind of block counts for no other: here it may make one graph of each."""
    model = put_right(stock("flux2"))
    transformer, inputs = model.model.diffusion_model, inputs_of("flux2", model)
    x, timestep = inputs.pop("x"), inputs.pop("timestep")
    with torch.inference_mode():
        truth = transformer(x, timestep, **inputs, transformer_options={})
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for blocks in (transformer.double_blocks, transformer.single_blocks):
        for number, block in enumerate(blocks):
            blocks[number] = torch.compile(block, backend=counter)
    put_right(model)
    options = {"optimized_attention_override": plain_attention}
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():
        found = transformer(x, timestep, **inputs, transformer_options=options)
    assert counter.frame_count == 2 and relative(found, truth) < 1e-5
    torch._dynamo.reset()


def test_foreign_hooks_are_still_refused() -> None:
    """Ours are no reason not to patch a model; another one on the same layer is."""
    model = put_right(stock("flux2"))
    norm = model.model.diffusion_model.single_blocks[0].pre_norm
    handle = norm.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match=r"a forward hook of single_blocks\.0\.pre_norm"):
        patch(model)
    handle.remove()
    patch(model)


def test_what_is_no_diffusion_model_is_refused(comfy: Any) -> None:
    from bonsai_ops.host.gradients import right_gradients

    device = torch.device("cpu")
    with pytest.raises(ValueError, match="no transformer or UNet"):
        right_gradients(comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), device, device))


@pytest.mark.parametrize(("bypass", "depths"), [(True, DEPTHS), (False, (0, 2))])
def test_train_lora_at_every_depth(pair: Pair, bypass: bool, depths: tuple[int, ...]) -> None:
    """ComfyUI's own node: the packed model's LoRA at any depth is that of the dense twin behind our node."""
    start = train_lora(pair.packed, learning_rate=0.0, bypass_mode=bypass).lora
    wanted = learned(train_lora(right_twin(pair), checkpoint_depth=2, bypass_mode=bypass).lora, start)
    assert wanted.any()
    for depth in depths:
        found = train_lora(
            pair.packed, gradient_checkpointing=depth > 0, checkpoint_depth=max(depth, 1), bypass_mode=bypass
        ).lora
        assert relative(learned(found, start), wanted) < 1e-5, depth
