"""Marks of weights that are stored in a rotated basis, in any container and spelling.

PrismML's second generation, language models so far, stores w' where w = w' H S is meant: H the normalized Hadamard
matrix on each block of 1024 inputs, S one sign an input. Whoever computes applies H S to the input of the layer, and
S H to the rows of an embedding. Codes, tables and shapes are those of a plain weight, so what reads them as one draws
noise and no check of numbers can tell. What tells:

    GGUF    metadata `prism.hadamard.*`: version, block_size, transform, sign_mode, sign_values, weight_names and more
    MLX     tensors `<layer>.signs`; "model_type": "prism_hadamard_.." and a list of modules in config.json

The description is second-hand, from what is published of the language models; no image model of this kind was at hand
to prove signs and order, so nothing is rotated back here. A mark refuses the file before a tensor of it is read: these,
the words that other rotations (QuaRot, SpinQuant) are written with, in the metadata of any container, in the names of
its tensors and in the JSON beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PackError, shown
from .files import is_file
from .json_file import MAX_VALUES, parse_json, read_small, values_in

if TYPE_CHECKING:
    from .formats.file import PackFile

CONFIGS = (
    "config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
    "manifest.json",
    "checkpoint_manifest.json",
    "model_index.json",
    "hadamard.json",
    "rotation.json",
)
"""What the JSON beside weights is called."""
INDEX = "*.index.json"
OF_A_PACK = ("*config*.json", "*manifest*.json")
"""What else describes it in a folder that nothing but a release has."""
RECORD, RECORD_TENSOR = "bonsai", "bonsai.record"
"""Our own record (formats/native.py) in a file, where its layers are in the plain basis."""
NOT_OURS = ("source", "model")
"""What in that record names others' things."""
FOREIGN = ("prompt", "workflow")
"""Metadata that ComfyUI adds: the user's own graph and texts."""
TRAINING = "ss_"
"""What metadata of a training tool begins with: captions, folders."""
MAX_DEPTH = 12
MAX_TEXT = 200
"""Characters of a text that may name a kind of file."""
_KIND = re.compile(r"hadamard|fwht|quarot|spinquant")
_SIGN = r"sign_?(?:mode|width|value|vector|flip)s?"
_ROTATE = r"rotations?|rotated|rotate(?!_half|_every|_pos)"  # not those of rotary position embeddings
_KEY = re.compile(rf"(?<![a-z])(?:signs|wht|had|{_ROTATE}|{_SIGN})(?![a-z])")
_LEAF = re.compile(rf"(?<![a-z])(?:signs?|wht|had|rot|su|sv|{_ROTATE}|{_SIGN})(?![a-z])")
_LISTED = re.compile(r"(?:[\w.*]*[.*])?(?:\w+_)?(?:signs|rotations?)")
"""A leaf of names, or a kind of transform, in a list of such."""
_VALUE = re.compile(r"(?<![a-z])(?:rotated|wht)(?![a-z])")
_APART = {"signs", "rotation", "rotations"}
"""What tensors that belong to no single layer are kept under: signs.3072, rotation.R1."""
_NO = ("0", "0.0", "false", "no", "none", "null", "off", "disabled", "identity")
CURE = (
    "Use the same model without the rotation, as the MLX and gemlite releases of Bonsai Image have it: this plugin "
    "does not undo one, and read as they lie these weights draw noise."
)


def require_unrotated(file: PackFile, folders: Collection[str]) -> None:
    """Raises PackError for a file with a mark, in itself or in a JSON beside it; reads no tensor.

    folders: the names of the folders of a release's parts; above a file in one of them the release's own JSON counts.
    """
    require_no_mark(file)
    for config in _beside(file.path, folders):
        mark = _mark_in_json(config)
        if mark is not None:
            name = config.name if config.parent == file.path.parent else f"{config.parent.name}/{config.name}"
            raise _rotated(
                file.path, f"{mark} in {name} beside it", f"{CURE} If {name} belongs to another model, take it away."
            )


def require_no_mark(file: PackFile) -> None:
    """Raises PackError for a file that has a mark itself: in its metadata or the names of its tensors."""
    recorded = RECORD in file.said() or any(name.endswith(RECORD_TENSOR) for name in file.names())
    mark = _mark_in_names(file.names(), recorded) or _mark_in_metadata(file.said(), recorded)
    if mark is not None:
        raise _rotated(file.path, mark, CURE)


def _rotated(path: Path, mark: str, cure: str) -> PackError:
    found = "says that the weights are stored in a rotated (Hadamard) basis, as PrismML's second generation has them"
    return PackError(path, found, cure, mark)


def _beside(path: Path, folders: Collection[str]) -> Iterator[Path]:
    """The JSON files that may describe a file of weights."""
    names = (*CONFIGS, f"{path.stem}.json", f"{path.name}.json")
    yield from (path.parent / name for name in names if is_file(path.parent / name))
    patterns = (INDEX, *OF_A_PACK) if path.parent.name in folders else (INDEX,)
    yield from (config for pattern in patterns for config in sorted(path.parent.glob(pattern)))
    if path.parent.name in folders:
        yield from (config for pattern in OF_A_PACK for config in sorted(path.parents[1].glob(pattern)))
        yield from (path.parents[1] / name for name in CONFIGS if is_file(path.parents[1] / name))


def _mark_in_names(names: Collection[str], recorded: bool) -> str | None:
    """The first name of a tensor that only a rotation has.

    recorded: a model of any architecture may have a parameter called so; beside a weight it belongs to that weight.
    """
    known = set(names) if recorded else ()
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if _KIND.search(name.lower()) or (not recorded and not _APART.isdisjoint(layer.lower().split("."))):
            return _shown(name)
        if _LEAF.search(_snake(leaf)) and (not recorded or f"{layer}.weight" in known):
            return _shown(name)
    return None


def _mark_in_metadata(said: Mapping[str, Any], recorded: bool) -> str | None:
    """The first entry of a file's metadata that says so; texts may be JSON again."""
    left = MAX_VALUES
    for key, value in said.items():
        if key in FOREIGN or key.startswith(TRAINING):
            continue
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            left -= values_in(value)
            value = _parsed(value) if left >= 0 else _KIND.findall(value.lower())
        if key == RECORD and isinstance(value, Mapping):
            value = {name: part for name, part in value.items() if name not in NOT_OURS}
        mark = _mark_in({key: value}, "", soft=not recorded)
        if mark is not None:
            return mark
    return None


def _mark_in_json(config: Path) -> str | None:
    """The first entry of a JSON file that says so; in a damaged one any word that does."""
    if not is_file(config):  # a pipe of that name would wait for ever
        return None
    try:
        raw = read_small(config)
    except PackError as error:
        if isinstance(error.__cause__, OSError):  # another user's: what must be read of it, its reader says
            return None
        raise
    try:
        content = parse_json(raw)
    except ValueError:
        found = _KIND.search(raw.decode("utf-8", "ignore").lower())
        return found and found[0]
    return _mark_in(content, "")


def _mark_in(tree: Any, place: str, soft: bool = True, depth: int = 0) -> str | None:
    """Where in nested tables a key or a text is a mark, None without one. soft: words of other use count too."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(tree, str):
        return f"{place} {_shown(tree)}".strip() if _is_kind(tree, soft) else None
    if isinstance(tree, Mapping):
        pairs: Iterable[tuple[str, Any]] = ((str(key), value) for key, value in tree.items())
    elif isinstance(tree, (list, tuple)):
        pairs = ((value if _is_listed(value) else "", value) for value in tree)
    else:
        return None
    for key, value in pairs:
        at = ".".join(part for part in (place, _shown(key)) if part)
        if _is_mark(key, soft) and not _says_no(value):
            return at
        mark = _mark_in(value, at, soft, depth + 1)
        if mark is not None:
            return mark
    return None


def _is_listed(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and _LISTED.fullmatch(value) is not None


def _is_mark(key: str, soft: bool) -> bool:
    is_file = "/" in key or any(c.isspace() for c in key)
    return bool(_KIND.search(key.lower()) or (soft and not is_file and _KEY.search(_snake(key))))


def _is_kind(text: str, soft: bool) -> bool:
    """Whether a text is one word (no sentence) that names a rotation."""
    if len(text) > MAX_TEXT or any(c.isspace() for c in text):
        return False
    return bool(_KIND.search(text.lower()) or (soft and _VALUE.search(_snake(text))))


def _says_no(value: Any) -> bool:
    """Whether the value of a mark says that there is no rotation."""
    if isinstance(value, str):
        return value.strip().lower() in _NO
    if isinstance(value, Mapping):
        return ("enabled" in value and _says_no(value["enabled"])) or all(map(_says_no, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_says_no, value))
    return value is None or value is False or (isinstance(value, (int, float)) and value == 0)


def _parsed(text: str) -> Any:
    """What a text holds that is JSON, else the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _snake(text: str) -> str:
    """A name in lower case, camelCase with underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()


def _shown(text: str) -> str:
    """A name for a message: one line, not long."""
    return shown(" ".join(text[:MAX_TEXT].split()), 80)
