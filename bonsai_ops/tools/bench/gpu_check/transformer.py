"""The 4B model in ComfyUI: load, step, memory, LoRA, offload, another backend and mode, a dense model beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from .... import kernels
from ....host.inventory import attached_inventory
from ..inside.step import with_lora
from .check import Check, relative
from .drawing import busy, draw, load_dense, load_ours, measured, pack_file, unload

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PARTS = ("dynamic", "classic")
RANK = 16
FEW = 3
"""Steps that a comparison draws."""
STREAMED_MB = 300
"""What dynamic VRAM may keep on the device when weights are streamed."""
TROUBLE = ("Pin error", "NOT LOADED", "could not compile", "failed on")
"""Words that the log should not hold."""


def run(check: Check, part: str) -> None:
    """part: dynamic or classic, ComfyUI's memory management."""
    sizes, count = ((512, 1024), 6) if check.on_gpu else ((64,), 1)
    with check.guarded("pack"):
        begun = time.perf_counter()
        pack_file(check)
        if check.on_gpu:
            torch.cuda.empty_cache()  # else what making it took counts as there before
        check.note("pack_written_s", time.perf_counter() - begun, show=False)
    before = check.used()
    check.watch()
    model, plain = _ours(check, sizes, count, before)
    if plain is not None:
        with check.guarded("other memory"):
            _compare_with_other(check, part, plain)
    if model is not None:
        with check.guarded("lora"):
            _lora(check, model, plain, sizes[0], count, part)
        with check.guarded("eager"):
            with kernels.use_backend("eager"):
                slow = measured(check, "ours eager", model, sizes[0], FEW)
            fast, _, _ = draw(check, model, sizes[0], FEW)
            check.note("eager against kernels", relative(slow, fast))
    with check.guarded("unload"):
        del model
        unload()
        check.note("left_mb_after_unload", (check.used() - before) >> 20)
    for mode in [mode for mode in kernels.MODES if mode.startswith("a8")] if check.on_gpu else []:
        with check.guarded(mode):
            _in_mode(check, mode, sizes, count)
    with check.guarded("dense"):
        _dense(check, sizes, count)
    text = check.settings.file(check.name, ".log").read_text(encoding="utf-8", errors="replace")
    check.note("warnings", {words: text.count(words) for words in TROUBLE if words in text})


def _ours(
    check: Check, sizes: tuple[int, ...], count: int, before: int
) -> tuple[ModelPatcher | None, torch.Tensor | None]:
    """(our model and its latent, None where it fails)."""
    model = latent = None
    with check.guarded("ours"):
        begun = time.perf_counter()
        model = load_ours(check)
        check.note("ours load_s", time.perf_counter() - begun)
        loaded = attached_inventory(model)
        facts = [loaded.backend, loaded.mode, loaded.dtype, dict(loaded.declined), type(model).__name__]
        check.note("ours report", facts)
        latent = measured(check, "ours", model, sizes[0], count)
        check.note("ours resident_mb", (check.used() - before) >> 20)
        check.note("ours loaded_size_mb", model.loaded_size() >> 20)
        again, _, _ = draw(check, model, sizes[0], count)
        check.note("ours repeats", relative(again, latent))
        for size in sizes[1:]:
            measured(check, "ours", model, size, 4)
        busy(check, "ours", model, sizes[0])
    return model, latent


def _in_mode(check: Check, mode: str, sizes: tuple[int, ...], count: int) -> None:
    """A mode whose rounding is coarser, on ternary weights as it wants them; not measured where it is not offered."""
    begun = time.perf_counter()
    model = load_ours(check, mode=mode, layout="fast")
    check.note(f"{mode} load_s", time.perf_counter() - begun)
    loaded = attached_inventory(model)
    if loaded.mode == mode:
        measured(check, f"ours {mode}", model, sizes[0], count)
        for size in sizes[1:]:
            measured(check, f"ours {mode}", model, size, 4)
    else:
        check.note(f"{mode} not offered", dict(loaded.declined))
    del model
    unload()


def _compare_with_other(check: Check, part: str, latent: torch.Tensor) -> None:
    """Keeps the latent for the other way to manage memory, and compares it with what that one has kept."""
    files = {name: check.settings.out / f"latent_{name}.npy" for name in PARTS}
    np.save(files[part], latent.numpy())
    for name in PARTS:
        if name != part and files[name].is_file():
            check.note(f"{part} == {name}", relative(latent, torch.from_numpy(np.load(files[name]))))


def _lora(check: Check, model: ModelPatcher, plain: torch.Tensor, size: int, count: int, part: str) -> None:
    """A LoRA on every layer: resident, offloaded or streamed, and gone again."""
    patched = with_lora(model, RANK)
    resident = measured(check, "lora", patched, size, count)
    check.note("lora changes", relative(resident, plain))
    busy(check, "lora", patched, size)
    if check.on_gpu and part == "classic":
        _offloaded(check, model, patched, plain, size, count)
    elif check.on_gpu:
        with check.guarded("watermark"):
            _streamed(check, patched, resident, size, count)
    back, _, _ = draw(check, model, size, count)
    check.note("without lora again", relative(back, plain))


def _offloaded(
    check: Check, model: ModelPatcher, patched: ModelPatcher, plain: torch.Tensor, size: int, count: int
) -> None:
    """Both models as on a GPU without memory for them."""
    import comfy.model_management as management

    state = management.vram_state
    unload()
    management.vram_state = management.VRAMState.NO_VRAM
    offloaded = measured(check, "lora offloaded", patched, size, FEW)
    latent, _, _ = draw(check, model, size, count)
    management.vram_state = state
    check.note("offloaded plain == resident", relative(latent, plain))
    one, _, _ = draw(check, patched, size, FEW)
    check.note("lora offloaded == resident", relative(offloaded, one))
    unload()


def _streamed(check: Check, patched: ModelPatcher, resident: torch.Tensor, size: int, count: int) -> None:
    """Dynamic VRAM with a limit far below the model's size."""
    vbar = patched._vbar_get()
    check.note("vbar_mb", [vbar.loaded_size() >> 20, vbar.get_nr_pages(), vbar.get_watermark()])
    vbar.free_memory(10**12)
    vbar.set_watermark_limit(STREAMED_MB << 20)
    latent = measured(check, "lora partly streamed", patched, size, count)
    check.note("vbar_mb streamed", vbar.loaded_size() >> 20)
    check.note("lora streamed == resident", relative(latent, resident))


def _dense(check: Check, sizes: tuple[int, ...], count: int) -> None:
    begun = time.perf_counter()
    model = load_dense(check)
    check.note("dense made_s", time.perf_counter() - begun, show=False)
    measured(check, "dense", model, sizes[0], count)
    for size in sizes[1:]:
        measured(check, "dense", model, size, 4)
    busy(check, "dense", model, sizes[0])
    measured(check, "dense lora", with_lora(model, RANK), sizes[0], FEW)
