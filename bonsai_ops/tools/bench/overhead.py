"""What a packed layer costs the processor beside its product: the time before a GPU is told what to multiply.

The layers are tiny and have one token, so that a product takes no time worth mentioning, and the packed layer's
backend only makes an empty result. No GPU is needed: what is timed are the same lines of code.
"""

from __future__ import annotations

from pathlib import Path

from . import session
from .report import show_table

ROWS = (
    # (key, what it is, key of the product that is in it)
    ("torch_linear", "torch.nn.Linear", "dense_product"),
    ("comfyui_linear", "ComfyUI's Linear", "dense_product"),
    ("layer", "packed layer", "result"),
    ("linear", "  of it kernels.linear", "result"),
    ("dispatch", "    of it the dispatcher", "result"),
    ("operator", "kernels.linear as an operator of torch", "result"),
    ("dense_product", "the dense product", None),
    ("result", "an empty result", None),
)
"""Each with all that it calls. operator: while torch.compile or gradients need one."""
CALLS, TURNS = 1000, 15


def measure(comfyui: Path, device: str = "cpu", calls: int = CALLS, turns: int = TURNS) -> list[dict]:
    """Prints a row for each of ROWS; returns [{"way", "us", "us_beside_product"}].

    us: microseconds of one call, the median over `turns` turns of `calls` calls each. us_beside_product: less the
    product that is in it, or the empty result.
    """
    options = {"comfyui": comfyui, "device": device, "calls": calls, "turns": turns}
    found = session.run("overhead", "timing tiny layers", **options)
    rows = [
        {"way": name, "us": found[name], "us_beside_product": None if part is None else found[name] - found[part]}
        for name, _, part in ROWS
    ]
    print(f"microseconds of the processor for one call of a tiny layer, {device}, median of {turns} turns")
    texts = [text for _, text, _ in ROWS]
    width = max(map(len, texts))
    show_table(
        ("".ljust(width), "a call", "beside the product"),
        [(text.ljust(width), r["us"], r["us_beside_product"]) for text, r in zip(texts, rows, strict=True)],
    )
    return rows
