"""Names and shapes of a FLUX.2 transformer: diffusers -> BFL (what ComfyUI's Flux class wants) and back, any size.

    diffusers                                              BFL
    transformer_blocks.i.attn.to_q, to_k, to_v             double_blocks.i.img_attn.qkv       rows one after another
    transformer_blocks.i.attn.add_{q,k,v}_proj             double_blocks.i.txt_attn.qkv       rows one after another
    transformer_blocks.i.attn.to_out.0, to_add_out         double_blocks.i.{img,txt}_attn.proj
    transformer_blocks.i.{ff,ff_context}.linear_in / _out  double_blocks.i.{img,txt}_mlp.0 / .2
    single_transformer_blocks.j.attn.to_qkv_mlp_proj       single_blocks.j.linear1
    single_transformer_blocks.j.attn.to_out                single_blocks.j.linear2
    .. norm_q, norm_k, norm_added_q, norm_added_k          .. norm.query_norm, norm.key_norm  (.weight -> .scale)
    time_guidance_embed.{timestep,guidance}_embedder       time_in, guidance_in
    norm_out.linear                                        final_layer.adaLN_modulation.1     halves of dim 0 swapped
    x_embedder, context_embedder, proj_out                 img_in, txt_in, final_layer.linear

norm_out is (scale, shift) in diffusers and (shift, scale) here. Heads have 128 channels, the MLP is 3 times as wide as
the hidden size and has no bias: the whole family shares that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .errors import PackError
from .formats.entries import DenseTensor, Entry, fuse_rows
from .recognise import foreign_model

HEAD_DIM = 128
MLP_RATIO = 3
TIME_CHANNELS = 256
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
MARKER = "double_stream_modulation_img.lin.weight"
"""Only FLUX.2 has it."""
MAX_BLOCKS = 512
"""Of either kind; FLUX.2 dev has 8 and 48."""
SWAPPED = "final_layer.adaLN_modulation.1.weight"
AS_PUBLISHED = "Use the file as it was published."


@dataclass(frozen=True)
class Geometry:
    """Sizes of one transformer. `context`: channels of the text embedding; `guidance`: it has a guidance embedder."""

    hidden: int
    context: int
    in_channels: int
    double_blocks: int
    single_blocks: int
    guidance: bool = False

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM


def expected_shapes(g: Geometry) -> dict[str, tuple[int, ...]]:
    """{BFL name: shape} of every tensor of a model with these sizes."""
    h, mlp = g.hidden, MLP_RATIO * g.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (h, g.in_channels),
        "txt_in.weight": (h, g.context),
        "time_in.in_layer.weight": (h, TIME_CHANNELS),
        "time_in.out_layer.weight": (h, h),
        MARKER: (6 * h, h),
        "double_stream_modulation_txt.lin.weight": (6 * h, h),
        "single_stream_modulation.lin.weight": (3 * h, h),
        SWAPPED: (2 * h, h),
        "final_layer.linear.weight": (g.in_channels, h),
    }
    if g.guidance:
        shapes |= {"guidance_in.in_layer.weight": (h, TIME_CHANNELS), "guidance_in.out_layer.weight": (h, h)}
    for i in range(g.double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= {
                f"{block}_attn.qkv.weight": (3 * h, h),
                f"{block}_attn.proj.weight": (h, h),
                f"{block}_attn.norm.query_norm.scale": (HEAD_DIM,),
                f"{block}_attn.norm.key_norm.scale": (HEAD_DIM,),
                f"{block}_mlp.0.weight": (2 * mlp, h),
                f"{block}_mlp.2.weight": (h, mlp),
            }
    for i in range(g.single_blocks):
        block = f"single_blocks.{i}"
        shapes |= {
            f"{block}.linear1.weight": (3 * h + 2 * mlp, h),
            f"{block}.linear2.weight": (h, h + mlp),
            f"{block}.norm.query_norm.scale": (HEAD_DIM,),
            f"{block}.norm.key_norm.scale": (HEAD_DIM,),
        }
    return shapes


def is_block_linear(name: str) -> bool:
    """True for the BFL names that Bonsai packs: the linear layers of the blocks."""
    return (
        re.fullmatch(
            r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])\.weight"
            r"|single_blocks\.\d+\.linear[12]\.weight",
            name,
        )
        is not None
    )


def diffusers_sources(g: Geometry) -> dict[str, tuple[str, ...]]:
    """{BFL name: the diffusers names whose rows it consists of} for every tensor of `expected_shapes`."""
    sources = {
        "img_in.weight": "x_embedder.weight",
        "txt_in.weight": "context_embedder.weight",
        "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
        "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
        "guidance_in.in_layer.weight": "time_guidance_embed.guidance_embedder.linear_1.weight",
        "guidance_in.out_layer.weight": "time_guidance_embed.guidance_embedder.linear_2.weight",
        MARKER: "double_stream_modulation_img.linear.weight",
        "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
        "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
        SWAPPED: "norm_out.linear.weight",
        "final_layer.linear.weight": "proj_out.weight",
    }
    fused: dict[str, tuple[str, ...]] = {bfl: (name,) for bfl, name in sources.items()}
    streams = (
        ("img", "to_{}", "to_out.0", "norm_{}", "ff"),
        ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", "ff_context"),
    )
    for i in range(g.double_blocks):
        old = f"transformer_blocks.{i}"
        for stream, qkv, proj, norm, mlp in streams:
            new = f"double_blocks.{i}.{stream}"
            fused |= {
                f"{new}_attn.qkv.weight": tuple(f"{old}.attn.{qkv.format(x)}.weight" for x in "qkv"),
                f"{new}_attn.proj.weight": (f"{old}.attn.{proj}.weight",),
                f"{new}_attn.norm.query_norm.scale": (f"{old}.attn.{norm.format('q')}.weight",),
                f"{new}_attn.norm.key_norm.scale": (f"{old}.attn.{norm.format('k')}.weight",),
                f"{new}_mlp.0.weight": (f"{old}.{mlp}.linear_in.weight",),
                f"{new}_mlp.2.weight": (f"{old}.{mlp}.linear_out.weight",),
            }
    for i in range(g.single_blocks):
        old, new = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        fused |= {
            f"{new}.linear1.weight": (f"{old}.to_qkv_mlp_proj.weight",),
            f"{new}.linear2.weight": (f"{old}.to_out.weight",),
            f"{new}.norm.query_norm.scale": (f"{old}.norm_q.weight",),
            f"{new}.norm.key_norm.scale": (f"{old}.norm_k.weight",),
        }
    wanted = expected_shapes(g)
    return {name: fused[name] for name in wanted}


def to_bfl(path: Path, entries: Mapping[str, Entry]) -> tuple[Geometry, dict[str, Entry]]:
    """(sizes, {BFL name: entry}) of a transformer with diffusers or BFL names, complete and of the right shapes.

    Raises PackError for another architecture, a missing or extra tensor, a wrong shape or dtype.
    """
    entries = _strip_prefix(entries)
    diffusers = any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in entries)
    if not diffusers:
        entries = {re.sub(r"(norm\.(?:query|key)_norm)\.weight$", r"\1.scale", name): e for name, e in entries.items()}
    geometry = measure(path, entries, diffusers)
    for entry in entries.values():
        if isinstance(entry, DenseTensor):
            entry.require_float()
    sources = diffusers_sources(geometry) if diffusers else {name: (name,) for name in expected_shapes(geometry)}
    needed = {old for parts in sources.values() for old in parts}
    missing = sorted(needed - entries.keys())
    if missing:
        raise PackError(
            path,
            f"is missing ({len(missing)} of {len(needed)} tensors are)",
            f"The file is incomplete: {AS_PUBLISHED[0].lower()}{AS_PUBLISHED[1:]}",
            missing[0],
        )
    _refuse_extra(path, geometry, sorted(entries.keys() - needed))
    renamed: dict[str, Entry] = {}
    for name, shape in expected_shapes(geometry).items():
        parts = [entries[old] for old in sources[name]]
        for part in parts:
            expected = (shape[0] // len(parts), *shape[1:])
            if tuple(part.shape) != expected:
                raise part.wrong_shape(f"Expected {list(expected)} for hidden size {geometry.hidden}. {AS_PUBLISHED}")
        entry = parts[0] if len(parts) == 1 else fuse_rows(name, parts)
        if not is_block_linear(name) and not isinstance(entry, DenseTensor):
            raise entry.error(
                "is packed", "Expected a dense tensor: only the linear layers of the blocks may be packed."
            )
        if diffusers and name == SWAPPED:
            entry = _swap_halves(entry)
        renamed[name] = entry
    return geometry, renamed


def to_diffusers(geometry: Geometry, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{diffusers name: tensor} of a transformer {BFL name: tensor}: what `to_bfl` puts together, taken apart."""
    found: dict[str, torch.Tensor] = {}
    for name, parts in diffusers_sources(geometry).items():
        tensor = _swapped(weights[name]) if name == SWAPPED else weights[name]
        found |= dict(zip(parts, (rows.contiguous() for rows in tensor.chunk(len(parts))), strict=True))
    return found


def _strip_prefix(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    for prefix in PREFIXES:
        if entries and all(name.startswith(prefix) for name in entries):
            return {name[len(prefix) :]: entry for name, entry in entries.items()}
    return dict(entries)


def _refuse_extra(path: Path, geometry: Geometry, extra: Sequence[str]) -> None:
    if extra:
        raise PackError(
            path,
            f"does not belong to a FLUX.2 transformer of {geometry.double_blocks} + {geometry.single_blocks} blocks "
            f"and hidden size {geometry.hidden} ({len(extra)} such tensors)",
            AS_PUBLISHED,
            extra[0],
        )


def measure(path: Path, entries: Mapping[str, Entry], diffusers: bool = False) -> Geometry:
    """The sizes from the embedders' shapes and the highest block numbers; names are BFL's or diffusers'.

    Raises PackError where they cannot be those of a FLUX.2 transformer.
    """
    image, text, marker = (
        ("x_embedder.weight", "context_embedder.weight", "double_stream_modulation_img.linear.weight")
        if diffusers
        else ("img_in.weight", "txt_in.weight", MARKER)
    )
    for name in (marker, image, text):
        if name not in entries:
            raise foreign_model(path, entries, name)
        if len(entries[name].shape) != 2:
            raise PackError(path, f"has shape {list(entries[name].shape)}", "Expected two dimensions.", name)
    double, single = (
        ("transformer_blocks", "single_transformer_blocks") if diffusers else ("double_blocks", "single_blocks")
    )
    hidden, in_channels = entries[image].shape
    if hidden % HEAD_DIM or not hidden:
        raise entries[image].error(f"has {hidden} rows", f"Expected a multiple of {HEAD_DIM}, the head size of FLUX.2.")
    for name, count in ((prefix, _blocks(entries, prefix)) for prefix in (double, single)):
        if count > MAX_BLOCKS:
            raise PackError(path, f"has {count} blocks", f"Expected at most {MAX_BLOCKS}. {AS_PUBLISHED}", name)
    embedder = "time_guidance_embed.guidance_embedder." if diffusers else "guidance_in."
    return Geometry(
        hidden,
        entries[text].shape[1],
        in_channels,
        _blocks(entries, double),
        _blocks(entries, single),
        any(name.startswith(embedder) for name in entries),
    )


def _blocks(entries: Mapping[str, Entry], prefix: str) -> int:
    """Highest block number + 1, but never more blocks than tensors: a damaged name must not ask for billions."""
    numbers = [int(m.group(1)) for name in entries if (m := re.match(rf"{prefix}\.(\d{{1,9}})\.", name))]
    return min(max(numbers, default=-1) + 1, len(entries))


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Both halves of dim 0 in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def _swap_halves(entry: DenseTensor) -> DenseTensor:
    return replace(entry, load=lambda: _swapped(entry.load()))
