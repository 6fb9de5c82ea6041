"""What belongs to another model - text states, latents, references, ControlNets - is refused by name and node."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CONTEXT, KINDS, POOLED, patch, stock
from twins import SMALL, TOKENS, Pair, draw, latent, load_device, relative, run_node, text

pytestmark = pytest.mark.host


def states(width: int, tokens: int = TOKENS, **options: Any) -> list:
    """A CONDITIONING of text states of this width."""
    made = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))
    return [[made, {"pooled_output": None, **options}]]


def content(*shape: int) -> dict[str, torch.Tensor]:
    """A LATENT that is not empty."""
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(2))}


def official(model: Any, positive: list, start: dict | None = None) -> torch.Tensor:
    """What the Bonsai Sampler draws."""
    from bonsai_ops.host.sampling import sample_official

    return sample_official(model, positive, start or latent(), 5, 2, 0.5)["samples"]


def stock_sampler(model: Any, positive: list, start: dict | None = None) -> torch.Tensor:
    return draw(model, positive=positive, negative=positive, start=start, denoise=0.5)


def custom_sampler(model: Any, positive: list, start: dict | None = None) -> torch.Tensor:
    """SamplerCustomAdvanced with a guider and a noise of ComfyUI's."""
    import comfy.samplers

    nodes = "comfy_extras.nodes_custom_sampler"
    return run_node(
        f"{nodes}.SamplerCustomAdvanced",
        noise=run_node(f"{nodes}.RandomNoise", noise_seed=5),
        guider=run_node(f"{nodes}.BasicGuider", model=model, conditioning=positive),
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=torch.tensor([0.5, 0.0]),
        latent_image=start or latent(),
    )["samples"]


SAMPLERS = (official, stock_sampler, custom_sampler)
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)
TORCHS_WORDS = re.compile("mat1|mat2|size of tensor|normalized_shape|unpack|einops|channels, but got|NoneType")

MISFITS = {
    "wider text": (states(512), None, ["positive conditioning", "512 wide", "Flux2 takes 128", "CLIP Text Encode"]),
    "narrow text": (states(100, tokens=600), None, ["100 wide", "takes 128", "CLIP Text Encode"]),
    "text of two dimensions": (
        [[torch.zeros(TOKENS, SMALL.context), {"pooled_output": None}]],
        None,
        [f"[{TOKENS}, 128]", "[batch, tokens, width]", "CLIP Text Encode"],
    ),
    "latent of FLUX.1": (text(), content(1, 16, 8, 12), ["[1, 16, 8, 12]", "128, height, width", "VAE"]),
    "latent of a video model": (text(), content(1, 16, 1, 8, 8), ["[1, 16, 1, 8, 8]", "128", "VAE"]),
    "reference of FLUX.1": (
        states(SMALL.context, reference_latents=[content(1, 16, 8, 8)["samples"]]),
        None,
        ["reference_latents", "[1, 16, 8, 8]", "128", "VAE Encode", "Reference Latent"],
    ),
    "second reference of Qwen": (
        states(SMALL.context, reference_latents=[content(1, 128, 4, 4)["samples"], content(1, 16, 1, 8, 8)["samples"]]),
        None,
        ["reference_latents", "[1, 16, 1, 8, 8]", "VAE Encode"],
    ),
}


@each_sampler
@pytest.mark.parametrize("case", MISFITS)
def test_what_belongs_to_another_model_is_named(sampler: Callable, case: str, pair: Pair) -> None:
    positive, start, parts = MISFITS[case]
    with pytest.raises(Exception):  # noqa: B017
        stock_sampler(pair.dense, positive, start)
    with pytest.raises(ValueError) as refused:
        sampler(pair.packed, positive, start)
    said = str(refused.value)
    assert all(part in said or (sampler is official and "latent of" in case) for part in parts), said
    assert not TORCHS_WORDS.search(said) and "\n" not in said
    assert "Change the node" in said or "Change VAE Encode" in said or "use Empty Flux 2 Latent" in said
    assert relative(stock_sampler(pair.packed, text()), stock_sampler(pair.dense, text())) < 1e-5


def test_our_sampler_names_the_node_for_a_dense_model_too(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"512 wide, Flux2 takes 128: .* Change the node that loads the CLIP"):
        official(pair.dense, states(512))
    with pytest.raises(ValueError, match=r"reference_latents .* Change VAE Encode"):
        official(pair.dense, MISFITS["reference of FLUX.1"][0])
    for model in (pair.packed, pair.dense):
        with pytest.raises(ValueError, match="empty: connect CLIP Text Encode"):
            official(model, [])


def test_the_negative_conditioning_is_told_from_the_positive(pair: Pair) -> None:
    with pytest.raises(ValueError, match="the negative conditioning is 96 wide"):
        draw(pair.packed, positive=text(), negative=states(96), cfg=2.0)
    assert draw(pair.packed, positive=text(), negative=states(96), cfg=1.0).isfinite().all()  # nobody reads it


def test_a_conditioning_without_text_is_named(pair: Pair) -> None:
    empty = [[None, {"pooled_output": None}]]
    with pytest.raises(ValueError, match=r"the positive conditioning holds no text states. Connect CLIP Text Encode"):
        draw(pair.packed, positive=empty)


LEGAL = {
    "no token": (states(SMALL.context, tokens=0), None),
    "more than 512 tokens": (states(SMALL.context, tokens=600), None),
    "pooled of any width": (states(SMALL.context, pooled_output=torch.ones(1, 9)), None),
    "guidance": (states(SMALL.context, guidance=7.0), None),
    "no guidance": (states(SMALL.context, guidance=None), None),
    "references of two sizes": (
        states(SMALL.context, reference_latents=[content(1, 128, 4, 4)["samples"], content(1, 128, 6, 2)["samples"]]),
        None,
    ),
    "no reference": (states(SMALL.context, reference_latents=[]), None),
    "inpainting of another VAE, which the model ignores": (
        states(SMALL.context, concat_latent_image=content(1, 16, 8, 8)["samples"], concat_mask=torch.ones(1, 1, 8, 8)),
        None,
    ),
    "empty latent of four channels": (text(), {"samples": torch.zeros(1, 4, 4, 6)}),
    "empty latent of sixteen channels": (text(), {"samples": torch.zeros(1, 16, 4, 6)}),
    "two pictures": (text(), {"samples": torch.zeros(2, 128, 4, 6)}),
    "two conditionings": (text(1) + text(2), None),
    "no conditioning": ([], None),
    "a mask": (states(SMALL.context, mask=torch.ones(1, 32, 48), mask_strength=1.0, set_area_to_bounds=False), None),
    "a noise mask": (text(), {"samples": content(1, 128, 4, 6)["samples"], "noise_mask": torch.ones(64, 96)}),
}


@pytest.mark.parametrize("case", LEGAL)
def test_what_the_dense_twin_accepts_is_accepted(case: str, pair: Pair) -> None:
    positive, start = LEGAL[case]
    found, truth = (stock_sampler(model, positive, start) for model in (pair.packed, pair.dense))
    assert torch.equal(found, truth) or relative(found, truth) < 1e-5


WRONG_LATENTS = {
    "flux": (1, 128, 4, 4),
    "sdxl": (1, 16, 8, 8),
    "sd3": (1, 4, 8, 8),
    "zimage": (1, 128, 4, 4),
    "qwen": (1, 48, 1, 8, 8),
    "wan": (1, 48, 1, 8, 8),
}


@pytest.mark.parametrize("kind", WRONG_LATENTS)
def test_patched_models_of_other_families_say_it_too(kind: str, comfy: Any) -> None:
    patched, _ = patch(stock(kind))
    name = type(patched.model).__name__
    own = {"pooled_output": torch.zeros(1, POOLED.get(kind, 8)), "guidance": 3.5}
    start = {"samples": torch.zeros(KINDS[kind].latent)}
    with pytest.raises(ValueError) as refused:
        stock_sampler(patched, [[torch.randn(1, TOKENS, 40), own]], start)
    assert f"40 wide, {name} takes {CONTEXT}" in str(refused.value)
    assert "Change the node that loads the CLIP" in str(refused.value) and "qwen" not in str(refused.value)
    with pytest.raises(ValueError) as refused:
        stock_sampler(patched, [[torch.randn(1, TOKENS, CONTEXT), own]], content(*WRONG_LATENTS[kind]))
    channels = KINDS[kind].latent[1]
    for part in (f"{list(WRONG_LATENTS[kind])}, {name} takes [batch, {channels}, ", "Change the node that makes it"):
        assert part in str(refused.value)
    assert "Flux 2" not in str(refused.value)
    if kind in POOLED:
        wrong = {**own, "pooled_output": torch.zeros(1, 24)}
        with pytest.raises(ValueError) as refused:
            stock_sampler(patched, [[torch.randn(1, TOKENS, CONTEXT), wrong]], start)
        assert f"pooled_output of the positive conditioning is 24 wide, {name} takes {POOLED[kind]}" in str(
            refused.value
        )
    assert stock_sampler(patched, [[torch.randn(1, TOKENS, CONTEXT), own]], start).isfinite().all()


def test_a_conditioning_without_the_pooled_states_a_model_reads(comfy: Any) -> None:
    patched, _ = patch(stock("sdxl"))
    start = {"samples": torch.zeros(KINDS["sdxl"].latent)}
    for options in ({}, {"pooled_output": None}):
        with pytest.raises(ValueError, match=r"has no pooled_output, which SDXL reads. Change the node"):
            stock_sampler(patched, [[torch.randn(1, TOKENS, CONTEXT), options]], start)


def controlled(control: Any) -> list:
    """Text states behind Apply ControlNet."""
    return run_node(
        "nodes.ControlNetApply", conditioning=text(), control_net=control, image=torch.zeros(1, 64, 96, 3), strength=1.0
    )


def test_a_control_net_of_another_family_is_named(pair: Pair) -> None:
    """An SD ControlNet stumbles over our latents, a T2I adapter's features over our model."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    import comfy.t2i_adapter.adapter

    made = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        model_channels=32,
        hint_channels=3,
        num_res_blocks=[1],
        channel_mult=[1],
        transformer_depth=[0],
        transformer_depth_middle=0,
        num_heads=1,
        context_dim=64,
        use_spatial_transformer=True,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    net = comfy.controlnet.ControlNet(made, load_device=load_device())
    features = comfy.t2i_adapter.adapter.Adapter(cin=192, channels=[32, 64, 64, 64], nums_rb=1)
    adapter = comfy.controlnet.T2IAdapter(features, 3, 8, "nearest-exact", device=load_device())
    for control in (net, adapter):
        with pytest.raises(ValueError) as refused:
            draw(pair.packed, positive=controlled(control))
        said = str(refused.value)
        assert f"the {type(control).__name__} in the positive conditioning" in said and "Change the ControlNet" in said
        assert "128 latent channels" in said and not TORCHS_WORDS.search(said)
    assert relative(draw(pair.packed), draw(pair.dense)) < 1e-5


def test_a_clone_and_a_compiled_model_say_it_too(pair: Pair) -> None:
    compiled = run_node("comfy_extras.nodes_torch_compile.TorchCompileModel", model=pair.packed, backend="eager")
    for model in (pair.packed.clone(), compiled):
        with pytest.raises(ValueError, match="512 wide, Flux2 takes 128"):
            stock_sampler(model, states(512))


def test_what_another_node_added_is_named(pair: Pair) -> None:
    """Such as a model patch for another family, which no LATENT or CONDITIONING shows."""
    adapter = torch.nn.Sequential(torch.nn.Linear(64, 64))

    def adapted(apply_model: Callable, arguments: dict) -> torch.Tensor:
        return apply_model(adapter(arguments["input"].movedim(1, -1)), arguments["timestep"], **arguments["c"])

    model = pair.packed.clone()
    model.set_model_unet_function_wrapper(adapted)
    with pytest.raises(ValueError, match=r"a Sequential that another node added to Flux2 .* takes 64, .* 128\]\. Take"):
        stock_sampler(model, text())


def test_a_refusal_travels_to_another_process(comfy: Any) -> None:
    """As tests/unit/test_errors.py says of the other errors."""
    from bonsai_ops.host.misfit import MisfitError

    arrived = pickle.loads(pickle.dumps(MisfitError("the latent is another model's")))
    assert type(arrived) is ValueError and str(arrived) == "the latent is another model's"


def test_other_errors_stay_as_they_are(pair: Pair) -> None:
    """A fault of somebody's own patch is not blamed on what was connected."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a patch of somebody's")

    model = pair.packed.clone()
    model.set_model_unet_function_wrapper(broken)
    with pytest.raises(RuntimeError, match=r"^a patch of somebody's$"):
        stock_sampler(model, text())
    positive = states(512)
    model.set_model_unet_function_wrapper(lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stock_sampler(model, positive)
