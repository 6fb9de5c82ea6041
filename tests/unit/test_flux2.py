"""Names and shapes of FLUX.2 transformers, listed here again and independently, and the way from one to the other."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from messages import reason

from bonsai_ops.tools.synthetic import KLEIN_4B, TINY
from bonsai_ops.weights import flux2
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.flux2 import Geometry
from bonsai_ops.weights.formats.entries import DenseTensor, Entry, PackedTensor

FILE = Path("folder") / "file.safetensors"
KLEIN_9B = Geometry(hidden=4096, context=12288, in_channels=128, double_blocks=8, single_blocks=24)
DEV = Geometry(hidden=6144, context=15360, in_channels=128, double_blocks=8, single_blocks=48, guidance=True)
SMALL = Geometry(hidden=128, context=96, in_channels=64, double_blocks=2, single_blocks=1)
GEOMETRIES = {"4B": KLEIN_4B, "9B": KLEIN_9B, "dev": DEV, "tiny": TINY, "small": SMALL}


def diffusers_list(g: Geometry) -> dict[str, tuple[int, ...]]:
    """{name: shape} of Flux2Transformer2DModel's tensors, from its published list."""
    h = g.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "time_guidance_embed.timestep_embedder.linear_1.weight": (h, 256),
        "time_guidance_embed.timestep_embedder.linear_2.weight": (h, h),
        "double_stream_modulation_img.linear.weight": (6 * h, h),
        "double_stream_modulation_txt.linear.weight": (6 * h, h),
        "single_stream_modulation.linear.weight": (3 * h, h),
        "x_embedder.weight": (h, g.in_channels),
        "context_embedder.weight": (h, g.context),
        "norm_out.linear.weight": (2 * h, h),
        "proj_out.weight": (g.in_channels, h),
    }
    if g.guidance:
        shapes["time_guidance_embed.guidance_embedder.linear_1.weight"] = (h, 256)
        shapes["time_guidance_embed.guidance_embedder.linear_2.weight"] = (h, h)
    for i in range(g.double_blocks):
        for leaf in ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]:
            shapes[f"transformer_blocks.{i}.attn.{leaf}.weight"] = (h, h)
        for leaf in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]:
            shapes[f"transformer_blocks.{i}.attn.{leaf}.weight"] = (128,)
        for leaf in ("ff", "ff_context"):
            shapes[f"transformer_blocks.{i}.{leaf}.linear_in.weight"] = (6 * h, h)
            shapes[f"transformer_blocks.{i}.{leaf}.linear_out.weight"] = (h, 3 * h)
    for i in range(g.single_blocks):
        shapes[f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj.weight"] = (9 * h, h)
        shapes[f"single_transformer_blocks.{i}.attn.to_out.weight"] = (h, 4 * h)
        for leaf in ("norm_q", "norm_k"):
            shapes[f"single_transformer_blocks.{i}.attn.{leaf}.weight"] = (128,)
    return shapes


def bfl_list(g: Geometry) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of BFL's own files, from their published list."""
    h = g.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "time_in.in_layer.weight": (h, 256),
        "time_in.out_layer.weight": (h, h),
        "double_stream_modulation_img.lin.weight": (6 * h, h),
        "double_stream_modulation_txt.lin.weight": (6 * h, h),
        "single_stream_modulation.lin.weight": (3 * h, h),
        "img_in.weight": (h, g.in_channels),
        "txt_in.weight": (h, g.context),
        "final_layer.adaLN_modulation.1.weight": (2 * h, h),
        "final_layer.linear.weight": (g.in_channels, h),
    }
    if g.guidance:
        shapes["guidance_in.in_layer.weight"] = (h, 256)
        shapes["guidance_in.out_layer.weight"] = (h, h)
    for i in range(g.double_blocks):
        for stream in ("img", "txt"):
            shapes[f"double_blocks.{i}.{stream}_attn.qkv.weight"] = (3 * h, h)
            shapes[f"double_blocks.{i}.{stream}_attn.proj.weight"] = (h, h)
            shapes[f"double_blocks.{i}.{stream}_attn.norm.query_norm.scale"] = (128,)
            shapes[f"double_blocks.{i}.{stream}_attn.norm.key_norm.scale"] = (128,)
            shapes[f"double_blocks.{i}.{stream}_mlp.0.weight"] = (6 * h, h)
            shapes[f"double_blocks.{i}.{stream}_mlp.2.weight"] = (h, 3 * h)
    for i in range(g.single_blocks):
        shapes[f"single_blocks.{i}.linear1.weight"] = (9 * h, h)
        shapes[f"single_blocks.{i}.linear2.weight"] = (h, 4 * h)
        shapes[f"single_blocks.{i}.norm.query_norm.scale"] = (128,)
        shapes[f"single_blocks.{i}.norm.key_norm.scale"] = (128,)
    return shapes


LISTS = {"diffusers": diffusers_list, "bfl": bfl_list}


def tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> dict[str, Entry]:
    """Entries of these shapes that hold no memory."""
    return {
        name: DenseTensor(FILE, name, shape, dtype, lambda shape=shape: torch.empty(shape, dtype=dtype, device="meta"))
        for name, shape in shapes.items()
    }


def is_packed_name(diffusers: str) -> bool:
    return "transformer_blocks." in diffusers and ".norm_" not in diffusers


@pytest.mark.parametrize(("g", "diffusers", "bfl"), [(KLEIN_4B, 169, 149), (KLEIN_9B, 233, 201), (DEV, 331, 299)])
def test_number_of_tensors(g: Geometry, diffusers: int, bfl: int) -> None:
    """149 and 169 are counted in the published 4B files; the rest follows from 16 and 12 a double block, 4 a single."""
    assert len(diffusers_list(g)) == diffusers and len(bfl_list(g)) == bfl
    assert len(flux2.expected_shapes(g)) == bfl
    assert sum(len(parts) for parts in flux2.diffusers_sources(g).values()) == diffusers


@pytest.mark.parametrize("name", GEOMETRIES)
def test_names_and_shapes(name: str) -> None:
    g = GEOMETRIES[name]
    assert flux2.expected_shapes(g) == bfl_list(g)
    sources, shapes = flux2.diffusers_sources(g), flux2.expected_shapes(g)
    assert sources.keys() == shapes.keys()
    assert {
        part: (shapes[bfl][0] // len(parts), *shapes[bfl][1:]) for bfl, parts in sources.items() for part in parts
    } == diffusers_list(g)


def test_parameters_of_the_4b_model() -> None:
    """The numbers of the published files."""
    sizes = {name: math.prod(shape) for name, shape in diffusers_list(KLEIN_4B).items()}
    packed = {name for name in sizes if is_packed_name(name)}
    assert sum(sizes.values()) == 3_875_544_576
    assert len(packed) == 100 and sum(sizes[n] for n in packed) == 3_680_501_760
    assert sum(sizes[n] for n in sizes if n not in packed) == 195_042_816
    shapes = flux2.expected_shapes(KLEIN_4B)
    assert sum(math.prod(s) for s in shapes.values()) == 3_875_544_576
    assert sum(math.prod(s) for n, s in shapes.items() if flux2.is_block_linear(n)) == 3_680_501_760


def test_packed_names() -> None:
    """80 BFL layers hold the 100 packed ones: 20 of them are three in one."""
    names = [name for name in bfl_list(KLEIN_4B) if flux2.is_block_linear(name)]
    assert len(names) == 80
    sources = flux2.diffusers_sources(KLEIN_4B)
    assert {part for name in names for part in sources[name]} == {
        n for n in diffusers_list(KLEIN_4B) if is_packed_name(n)
    }


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("names", LISTS)
@pytest.mark.parametrize("prefix", ["", *flux2.PREFIXES])
def test_sizes_are_measured_from_the_file(names: str, name: str, prefix: str) -> None:
    g = GEOMETRIES[name]
    found, entries = flux2.to_bfl(FILE, tensors({prefix + n: shape for n, shape in LISTS[names](g).items()}))
    assert found == g
    assert {n: tuple(entry.shape) for n, entry in entries.items()} == bfl_list(g)


def test_heads_have_128_channels() -> None:
    assert [g.heads for g in (KLEIN_4B, KLEIN_9B, DEV)] == [24, 32, 48]


def test_norms_may_be_called_weight() -> None:
    """As newer ComfyUI versions call them."""
    shapes = {
        n.removesuffix(".scale") + ".weight" if n.endswith(".scale") else n: s for n, s in bfl_list(SMALL).items()
    }
    _, entries = flux2.to_bfl(FILE, tensors(shapes))
    assert entries.keys() == bfl_list(SMALL).keys()


def filled(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    """Entries over random values, and those values."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    entries = {n: DenseTensor(FILE, n, tuple(v.shape), v.dtype, lambda v=v: v.clone()) for n, v in values.items()}
    return entries, values


def test_values_go_where_they_belong() -> None:
    """q, k, v one after another; the halves of norm_out swapped; everything else as it is."""
    entries, old = filled(diffusers_list(SMALL))
    _, renamed = flux2.to_bfl(FILE, entries)
    new = {name: entry.load() for name, entry in renamed.items()}
    for i in range(SMALL.double_blocks):
        a, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, qkv in (("img", "to_{}"), ("txt", "add_{}_proj")):
            rows = [old[f"{a}.attn.{qkv.format(x)}.weight"] for x in "qkv"]
            assert torch.equal(new[f"{b}.{stream}_attn.qkv.weight"], torch.cat(rows))
        for to, source in {
            "img_attn.proj.weight": "attn.to_out.0.weight",
            "txt_attn.proj.weight": "attn.to_add_out.weight",
            "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
            "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
            "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
            "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
            "img_mlp.0.weight": "ff.linear_in.weight",
            "img_mlp.2.weight": "ff.linear_out.weight",
            "txt_mlp.0.weight": "ff_context.linear_in.weight",
            "txt_mlp.2.weight": "ff_context.linear_out.weight",
        }.items():
            assert torch.equal(new[f"{b}.{to}"], old[f"{a}.{source}"]), to
    for to, source in {
        "single_blocks.0.linear1.weight": "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
        "single_blocks.0.linear2.weight": "single_transformer_blocks.0.attn.to_out.weight",
        "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
        "single_blocks.0.norm.key_norm.scale": "single_transformer_blocks.0.attn.norm_k.weight",
        "img_in.weight": "x_embedder.weight",
        "txt_in.weight": "context_embedder.weight",
        "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
        "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
        "double_stream_modulation_img.lin.weight": "double_stream_modulation_img.linear.weight",
        "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
        "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
        "final_layer.linear.weight": "proj_out.weight",
    }.items():
        assert torch.equal(new[to], old[source]), to
    scale, shift = old["norm_out.linear.weight"].chunk(2)
    assert torch.equal(new["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


@pytest.mark.parametrize("guidance", [False, True])
def test_every_value_finds_its_way_back(guidance: bool) -> None:
    """diffusers' names, BFL's and diffusers' again; and from the middle to the middle."""
    g = replace(SMALL, guidance=guidance)
    entries, old = filled(diffusers_list(g))
    found, renamed = flux2.to_bfl(FILE, entries)
    new = {name: entry.load() for name, entry in renamed.items()}
    back = flux2.to_diffusers(flux2.measure(FILE, renamed), new)
    assert found == g and back.keys() == old.keys()
    assert [name for name in old if not torch.equal(back[name], old[name])] == []
    assert all(tensor.is_contiguous() for tensor in back.values())


def test_values_with_bfl_names_stay_as_they_are() -> None:
    entries, old = filled(bfl_list(SMALL))
    _, renamed = flux2.to_bfl(FILE, entries)
    for name, entry in renamed.items():
        assert torch.equal(entry.load(), old[name]), name


@pytest.mark.parametrize("names", LISTS)
def test_any_missing_tensor_is_named(names: str) -> None:
    for name in LISTS[names](SMALL):
        entries = tensors(LISTS[names](SMALL))
        del entries[name]
        with pytest.raises(PackError) as refusal:
            flux2.to_bfl(FILE, entries)
        assert name in reason(refusal.value, FILE)


@pytest.mark.parametrize("names", LISTS)
def test_a_missing_block_is_named(names: str) -> None:
    block = {"diffusers": "transformer_blocks.0.", "bfl": "double_blocks.0."}[names]
    shapes = {n: s for n, s in LISTS[names](SMALL).items() if not n.startswith(block)}
    lost = len(LISTS[names](SMALL)) - len(shapes)
    with pytest.raises(
        PackError, match=rf"{block}.*: is missing \({lost} of .* tensors are\)\. The file is incomplete"
    ):
        flux2.to_bfl(FILE, tensors(shapes))


@pytest.mark.parametrize("names", LISTS)
@pytest.mark.parametrize("extra", ["stranger.weight", "x_embedder.bias", "guidance.weight"])
def test_an_extra_tensor_is_named(names: str, extra: str) -> None:
    shapes = {**LISTS[names](SMALL), extra: (4,)}
    message = (
        rf"{extra}: does not belong to a FLUX\.2 transformer of 2 \+ 1 blocks and hidden size 128 \(1 such tensors\)"
    )
    with pytest.raises(PackError, match=message):
        flux2.to_bfl(FILE, tensors(shapes))


@pytest.mark.parametrize("number", [10**6, 10**12, 10**30])
def test_an_absurd_block_number_is_refused_at_once(number: int) -> None:
    """Without listing the tensors of a billion blocks first."""
    shapes = {**bfl_list(SMALL), f"single_blocks.{number}.linear1.weight": (4,)}
    with pytest.raises(PackError, match=r"single_blocks\.\d+\."):
        flux2.to_bfl(FILE, tensors(shapes))


@pytest.mark.parametrize("names", LISTS)
def test_any_wrong_shape_is_refused(names: str) -> None:
    """The message names tensor, found and expected shape; the embedders define the sizes, so their error is another."""
    for name, shape in LISTS[names](SMALL).items():
        wrong = (shape[0] + 128, *shape[1:])
        with pytest.raises(PackError) as refusal:
            flux2.to_bfl(FILE, tensors({**LISTS[names](SMALL), name: wrong}))
        if name not in ("img_in.weight", "x_embedder.weight"):
            said = reason(refusal.value, FILE)
            assert said.startswith(f"{name}: has shape {list(wrong)}. Expected {list(shape)}")


@pytest.mark.parametrize(
    ("shape", "message"), [((130, 64), "has 130 rows"), ((0, 64), "has 0 rows"), ((128,), "shape")]
)
def test_an_impossible_width_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(PackError, match=rf"img_in\.weight: has .*{message.removeprefix('has ')}"):
        flux2.to_bfl(FILE, tensors({**bfl_list(SMALL), "img_in.weight": shape}))


def test_tensors_must_be_floats() -> None:
    entries = tensors(bfl_list(SMALL))
    entries |= tensors({"img_in.weight": (128, 64)}, torch.float8_e4m3fn)
    with pytest.raises(
        PackError, match=r"img_in\.weight: is torch\.float8_e4m3fn \[128, 64\]\. Expected bf16, fp16 or fp32"
    ):
        flux2.to_bfl(FILE, entries)


def test_only_block_layers_may_be_packed() -> None:
    entries = tensors(bfl_list(SMALL))
    entries["final_layer.linear.weight"] = PackedTensor(FILE, "final_layer.linear.weight", (64, 128), lambda: None)
    with pytest.raises(PackError, match=r"final_layer\.linear\.weight: is packed\. Expected a dense tensor"):
        flux2.to_bfl(FILE, entries)
