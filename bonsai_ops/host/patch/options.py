"""What "Patch to BitLinear" is asked to do: which layers, how many bits, which size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...quantize import AFFINE, RECIPES, Settings

EXCLUDED = (
    # embedders of picture, text, time and guidance
    "img_in*",
    "txt_in*",
    "time_in*",
    "vector_in*",
    "guidance_in*",
    "*_embedder*",
    "*embedding*",
    "time_embed*",
    "time_text_embed*",
    "label_emb*",
    "time_projection*",
    "img_emb*",
    "patch_embed*",
    "patchify_proj*",
    "caption_projection*",
    "pos_embed*",
    "distilled_guidance_layer*",
    # modulation
    "*modulation*",
    "*img_mod*",
    "*txt_mod*",
    "*adaLN*",
    "*adaln*",
    "*emb_layers*",
    # the end
    "final_layer*",
    "norm_out*",
    "proj_out",
    "head.*",
    "out.*",
)
"""Layers that stay as they are unless the user says otherwise, as in PrismML's models."""


@dataclass(frozen=True)
class PatchOptions:
    """What to pack and how. include, exclude: patterns of fnmatch on layer names, such as "double_blocks.*.qkv".

    recipe: one of quantize.RECIPES. target_bytes: size the whole model may have; layers then get 4 or 8 bits or stay as
    they are where that helps most. None: all alike.
    """

    recipe: str = "ternary"
    group_size: int = 128
    rank: int = 0
    target_bytes: int | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = EXCLUDED
    dry_run: bool = False

    @property
    def settings(self) -> Settings:
        return Settings(self.recipe, self.group_size, self.rank)

    @property
    def finer(self) -> tuple[Settings, ...]:
        """The recipes with more bits that a target size may give to a layer, the smallest first."""
        later = RECIPES[RECIPES.index(self.recipe) + 1 :] if self.recipe in AFFINE else AFFINE
        return tuple(Settings(recipe, self.group_size) for recipe in later)


def patterns(text: str) -> tuple[str, ...]:
    """The patterns in a text with commas (also Arabic, Chinese and Japanese), spaces or line ends between them."""
    return tuple(re.findall(r"[^\s,\u060c\uff0c\u3001]+", text))
