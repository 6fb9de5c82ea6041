"""How many columns the matrices of a Qwen3 have, as the other tensors of its file tell it.

Codes of b bits in words say N and K b only. A norm is as wide as what it normalizes, and what one matrix gives another
takes, so K is known without a JSON beside the file; b and the group size follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN, HEADS, MLP = "hidden", "heads", "mlp"
TOLD_BY = {
    r"(?:input_layernorm|post_attention_layernorm|model\.norm)\.weight": HIDDEN,
    r"self_attn\.q_proj\.weight": HEADS,
    r"mlp\.(?:gate|up)_proj\.weight": MLP,
}
"""{end of a name: the width that is the tensor's first dimension}."""
TAKES = {
    r"self_attn\.[qkv]_proj": HIDDEN,
    r"mlp\.(?:gate|up)_proj": HIDDEN,
    r"embed_tokens": HIDDEN,
    r"lm_head": HIDDEN,
    r"self_attn\.o_proj": HEADS,
    r"mlp\.down_proj": MLP,
}
"""{end of a layer's name: the width that its weight has columns of}."""


class Columns:
    """The widths that a file tells. shapes: {name: shape} of its tensors; two that contradict one another tell none."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        found: dict[str, set[int]] = {}
        for name, shape in shapes.items():
            if shape and shape[0] and (width := _of(name, TOLD_BY)) is not None:
                found.setdefault(width, set()).add(shape[0])
        self._widths = {width: sizes.pop() for width, sizes in found.items() if len(sizes) == 1}

    def of(self, layer: str) -> int | None:
        """The columns of the weight of a layer (a name without `.weight`), None where nothing tells."""
        width = _of(layer, TAKES)
        return None if width is None else self._widths.get(width)


def _of(name: str, table: Mapping[str, str]) -> str | None:
    return next((width for end, width in table.items() if re.search(rf"(?:^|\.){end}$", name)), None)
