"""How deep a model must be: a file whose last blocks are missing looks like a shallower model and would draw noise.

The depth is told by the file itself (GGUF's metadata; a native file's record lists its layers), else by a config.json
of diffusers beside it, else by the widths, where a published FLUX.2 has them. Nothing tells that of other sizes.
"""

from __future__ import annotations

from pathlib import Path

from .errors import PackError
from .files import is_file
from .flux2 import Geometry
from .formats.entries import DOWNLOAD_AGAIN, Pack
from .json_file import is_count, read_json

CONFIG = "config.json"
PUBLISHED = {(3072, 7680): (5, 20), (4096, 12288): (8, 24), (6144, 15360): (8, 48)}
"""{(hidden size, channels of the text embedding): (double, single) blocks} of Klein 4B, Klein 9B and FLUX.2 dev."""


def require_depth(pack: Pack, geometry: Geometry) -> None:
    """Raises PackError if blocks are missing from the end of a FLUX.2 transformer."""
    if pack.recorded:
        return
    found = (geometry.double_blocks, geometry.single_blocks)
    says = "it has {} double and {} single blocks".format(*found)
    if not all(found):
        raise PackError(pack.path, f"is no whole FLUX.2 transformer: {says}", DOWNLOAD_AGAIN)
    told = _told_by_file(pack, found) or _told_beside(pack.path, geometry)
    if told is not None:
        depth, who, cure = told
        if depth != found:
            raise _missing(pack.path, says, f"{who} says {depth[0]} and {depth[1]}", f"{DOWNLOAD_AGAIN}{cure}")
        return
    depth = PUBLISHED.get((geometry.hidden, geometry.context), (0, 0))
    if found[0] < depth[0] or found[1] < depth[1]:
        whose = f"a FLUX.2 of hidden size {geometry.hidden} has {depth[0]} and {depth[1]}"
        raise _missing(pack.path, says, whose, DOWNLOAD_AGAIN)


def told_layers(path: Path, hidden: int, held: int) -> int | None:
    """num_hidden_layers of the config.json beside a text encoder, None if it tells none of this one.

    hidden: width of the encoder. held: layers that it holds. A config.json of another width or of fewer layers belongs
    to another model, of which many lie in one folder. Raises PackError.
    """
    config = path.parent / CONFIG
    content = read_json(config) if is_file(config) else None
    if not isinstance(content, dict) or content.get("hidden_size", hidden) != hidden:
        return None
    layers = content.get("num_hidden_layers")
    return layers if is_count(layers) and layers >= held else None


def _missing(path: Path, says: str, truth: str, cure: str) -> PackError:
    return PackError(path, f"has not all blocks: {says}, but {truth}", cure)


def _told_by_file(pack: Pack, found: tuple[int, int]) -> tuple[tuple[int, int], str, str] | None:
    """What a container's own metadata says; a single number counts the double blocks or all of them."""
    double, single = (pack.counts.get(name) for name in ("num_layers", "num_single_layers"))
    if double and single:
        return (double, single), "its metadata", ""
    count = pack.counts.get("block_count")
    if count and count not in (found[0], sum(found)):
        raise _missing(pack.path, "it has {} + {} blocks".format(*found), f"its metadata says {count}", DOWNLOAD_AGAIN)
    return None


def _told_beside(path: Path, geometry: Geometry) -> tuple[tuple[int, int], str, str] | None:
    """What the config.json of the file's folder, or of the release's `transformer`, says of a model of this width."""
    for config in (path.parent / CONFIG, path.parent.parent / "transformer" / CONFIG):
        content = read_json(config) if is_file(config) else None
        if not isinstance(content, dict):
            continue
        depth = (content.get("num_layers"), content.get("num_single_layers"))
        heads, channels = content.get("num_attention_heads"), content.get("attention_head_dim")
        another = is_count(heads) and is_count(channels) and heads * channels != geometry.hidden
        if all(map(is_count, depth)) and not another:
            name = config.relative_to(path.parent if config.parent == path.parent else path.parent.parent)
            cure = f" If {name.as_posix()} belongs to another model, take it away."
            return depth, f"{name.as_posix()} beside it", cure
    return None
