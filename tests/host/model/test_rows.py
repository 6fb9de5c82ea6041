"""Patches that are no plain LoRA, cut to the rows that are unpacked: the same values as on the whole weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_weights import random_weight
from torch.utils._python_dispatch import TorchDispatchMode
from twins import relative

from bonsai_ops.weights import packed_weight

pytestmark = pytest.mark.host

ROWS, COLUMNS, RANK = 136, 256, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / RANK


def lora(rows: int, columns: int, magnitude: torch.Tensor | None = None, alpha: float | None = 2.0) -> Any:
    from comfy.weight_adapter import LoRAAdapter

    return LoRAAdapter(set(), (draw(rows, RANK), draw(RANK, columns, seed=1), alpha, None, magnitude, None))


def loha(rows: int, columns: int, magnitude: torch.Tensor | None = None) -> Any:
    from comfy.weight_adapter import LoHaAdapter

    pairs = [draw(rows, RANK), draw(RANK, columns, seed=1), draw(rows, RANK, seed=2), draw(RANK, columns, seed=3)]
    return LoHaAdapter(set(), (*pairs[:2], 2.0, *pairs[2:], None, None, magnitude))


def lokr() -> Any:
    from comfy.weight_adapter import LoKrAdapter

    weights = (draw(8, 16), draw(ROWS // 8, COLUMNS // 16), 2.0, None, None, None, None, None, None)
    return LoKrAdapter(set(), weights)


def a_row(rows: int = ROWS) -> torch.Tensor:
    return draw(rows, 1, seed=4).abs() + 0.5


CUT: dict[str, Callable[[], list[tuple]]] = {
    "lora": lambda: [(0.7, lora(ROWS, COLUMNS), 1.0, None, None)],
    "no alpha": lambda: [(0.7, lora(ROWS, COLUMNS, alpha=None), 1.0, None, None)],
    "dora": lambda: [(0.7, lora(ROWS, COLUMNS, a_row()), 1.0, None, None)],
    "dora at full strength": lambda: [(1.0, lora(ROWS, COLUMNS, a_row()), 1.0, None, None)],
    "loha": lambda: [(0.7, loha(ROWS, COLUMNS), 1.0, None, None)],
    "loha as dora": lambda: [(0.7, loha(ROWS, COLUMNS, a_row()), 1.0, None, None)],
    "difference": lambda: [(0.7, ("diff", (draw(ROWS, COLUMNS),)), 1.0, None, None)],
    "new weight": lambda: [(0.7, ("set", (draw(ROWS, COLUMNS),)), 1.0, None, None)],
    "strength of the model": lambda: [(0.7, lora(ROWS, COLUMNS, a_row()), 0.3, None, None)],
    "slice of rows": lambda: [(0.7, lora(40, COLUMNS, a_row(40)), 1.0, (0, 50, 40), None)],
    "slice of columns": lambda: [(0.7, lora(ROWS, 64, a_row()), 1.0, (1, 128, 64), None)],
    "several": lambda: [
        (0.7, lora(ROWS, COLUMNS, a_row()), 1.0, None, None),
        (0.4, ("diff", (draw(30, COLUMNS),)), 1.0, (0, 106, 30), None),
        (-0.2, loha(ROWS, 128), 1.0, (1, 0, 128), None),
        (0.5, lora(ROWS, COLUMNS), 1.0, None, None),
    ],
}
WHOLE: dict[str, Callable[[], list[tuple]]] = {
    "lokr": lambda: [(0.7, lokr(), 1.0, None, None)],
    "a magnitude a column": lambda: [(0.7, lora(ROWS, COLUMNS, draw(1, COLUMNS, seed=4).abs()), 1.0, None, None)],
    "a function": lambda: [(0.7, lora(ROWS, COLUMNS), 1.0, None, lambda change: change / change.norm())],
    "one of several": lambda: [(0.7, lora(ROWS, COLUMNS), 1.0, None, None), (0.7, lokr(), 1.0, None, None)],
    "another size": lambda: [(0.7, lora(ROWS, COLUMNS // 2, a_row()), 1.0, None, None)],
    "another rank": lambda: [(0.7, lora(ROWS, COLUMNS // RANK, a_row()), 1.0, None, None)],
    "padded": lambda: [(0.7, ("diff", (draw(ROWS, COLUMNS), {"pad_weight": True})), 1.0, None, None)],
}
"""Patches that rows.py cuts, and those that need all rows."""


def layer_with(patches: list[tuple]) -> tuple[Any, torch.Tensor]:
    """(a packed layer with these patches, its weight as ComfyUI patches a dense one)."""
    import comfy.lora

    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops
    from bonsai_ops.host.lora import LayerPatches

    weight = random_weight("ternary", "trit5", ROWS, COLUMNS)
    layer = make_bonsai_ops().Linear(COLUMNS, ROWS, bias=True, dtype=torch.float32)
    layer.load_state_dict({"weight": wrap(weight, torch.float32), "bias": draw(ROWS, seed=5)})
    layer.resident_patch = LayerPatches("w", patches, (ROWS, COLUMNS))
    return layer, comfy.lora.calculate_weight(patches, weight.dequantize(), "w")


@pytest.mark.parametrize("kind", CUT)
def test_rows_alone_are_patched_as_the_whole(comfy: Any, kind: str) -> None:
    from bonsai_ops.host.rows import on_rows

    patches = CUT[kind]()
    layer, truth = layer_with(patches)
    x = draw(2, 5, COLUMNS, seed=6)
    assert relative(layer(x), torch.nn.functional.linear(x, truth, layer.bias)) < 1e-5
    base = random_weight("ternary", "trit5", ROWS, COLUMNS).dequantize()
    for first, last in ((0, ROWS), (0, 7), (49, 51), (51, 60), (88, 136), (135, 136)):
        part = comfy.lora.calculate_weight(
            on_rows(patches, (ROWS, COLUMNS), first, last), base[first:last].clone(), "w"
        )
        assert relative(part, truth[first:last]) < 1e-6
    assert relative(truth, base) > 1e-2


@pytest.mark.parametrize("kind", WHOLE)
def test_what_needs_all_rows_has_them(comfy: Any, kind: str) -> None:
    from bonsai_ops.host.rows import on_rows

    patches = WHOLE[kind]()
    assert on_rows(patches, (ROWS, COLUMNS), 0, 8) is None
    layer, truth = layer_with(patches)
    x = draw(2, 5, COLUMNS, seed=6)
    assert relative(layer(x), torch.nn.functional.linear(x, truth, layer.bias)) < 1e-5


class Largest(TorchDispatchMode):
    """The most values that an operator gave."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if type(out) is torch.Tensor and out.is_floating_point():
            self.values = max(self.values, out.numel())
        return out


@pytest.mark.parametrize("kind", ["dora", "loha", "several"])
def test_the_layer_is_never_unpacked_whole(comfy: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DoRA on the largest layer of FLUX.2 Klein 4B took 1 GB for a moment."""
    monkeypatch.setattr(packed_weight, "SCRATCH_BYTES", 12 * ROWS * COLUMNS // 4)  # 12: bytes a weight in the making
    layer, _ = layer_with(CUT[kind]())
    with torch.inference_mode(), Largest() as found:
        layer(draw(1, COLUMNS, seed=6))
    assert 0 < found.values <= ROWS * COLUMNS // 4


def test_its_matrices_are_sent_once(comfy: Any) -> None:
    """With the weight elsewhere, as dynamic VRAM leaves it: for all rows together, and not again."""
    from comfy.model_patcher import LowVramPatch

    patches = CUT["dora"]()
    layer, _ = layer_with(patches)
    layer.resident_patch, layer.weight_lowvram_function = None, LowVramPatch("w", {"w": patches})
    sent: list[Any] = []

    class Sent(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if type(out) is torch.Tensor and args and isinstance(args[0], torch.Tensor) and out.is_meta:
                sent.extend([func] * any(args[0] is t for t in patches[0][1].weights if t is not None))
            return out

    with torch.inference_mode(), Sent():
        layer(torch.ones(1, COLUMNS, device="meta"))
        assert len(sent) == 3
        layer(torch.ones(1, COLUMNS, device="meta"))
        assert len(sent) == 3 and layer.kept_loras.nbytes == 4 * (RANK * (ROWS + COLUMNS) + ROWS)
        layer.kept_loras.give_back()
        layer(torch.ones(1, COLUMNS, device="meta"))
    assert len(sent) == 6 and layer.kept_loras.nbytes == 0


def test_a_gradient_goes_through_the_whole_weight(comfy: Any) -> None:
    layer, truth = layer_with(CUT["dora"]())
    x = draw(2, COLUMNS, seed=6).requires_grad_()
    layer(x).sum().backward()
    assert relative(x.grad, truth.sum(0).expand(2, -1)) < 1e-5
