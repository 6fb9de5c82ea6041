"""Fixtures around the models of twins.py: fresh pairs, files of LoRAs, and the plugin imported twice."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from twins import VARIANTS, Pair, load_stock, read_dense, write_pack


@pytest.fixture(scope="session")
def comfy(comfyui_path: Path) -> Iterator[Any]:
    """The package `comfy` of the ComfyUI in this process, no progress bars."""
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    import nodes  # noqa: F401

    importlib.import_module("bonsai_ops.kernels")  # before a test's copy of the plugin: operators are the first one's
    threads, bars = torch.get_num_threads(), comfy.utils.PROGRESS_BAR_ENABLED
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for one another
    comfy.utils.PROGRESS_BAR_ENABLED = False
    yield comfy
    torch.set_num_threads(threads)
    comfy.utils.PROGRESS_BAR_ENABLED = bars


@pytest.fixture(autouse=True)
def no_text_states(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is given what another had encoded."""
    from bonsai_ops.host import text_states

    monkeypatch.setattr(text_states, "STATES", text_states.TextStates())


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """{variant: transformer file}."""
    folder = tmp_path_factory.mktemp("packs")
    return {v: write_pack(folder / v / "model.safetensors", v, seed=i) for i, v in enumerate(VARIANTS)}


@pytest.fixture
def make_pair(comfy: Any, packs: Mapping[str, Path]) -> Iterator[Callable[..., Pair]]:
    """A function from a variant to a fresh pair; afterwards every model is unloaded."""
    from bonsai_ops.host.loader import load_bonsai_model

    def make(variant: str = "ternary") -> Pair:
        path = packs[variant]
        return Pair(path, load_bonsai_model(path, {"compute_dtype": "fp32"}), load_stock(read_dense(path)))

    comfy.model_management.unload_all_models()
    yield make
    comfy.model_management.unload_all_models()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """A ternary model and its twin."""
    return make_pair()


@pytest.fixture(params=VARIANTS)
def each_pair(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Pair:
    """A pair of each variant in turn."""
    return make_pair(request.param)


@pytest.fixture
def lora_file(comfy_base_directory: Path) -> Iterator[Callable[..., str]]:
    """A function that writes tensors to models/loras and returns the file's name there."""
    folder = comfy_base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(tensors: Mapping[str, torch.Tensor]) -> str:
        path = folder / f"test-{len(written)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        written.append(path)
        return path.name

    yield write
    for path in written:
        path.unlink()


@pytest.fixture
def second_import() -> Iterator[str]:
    """The name under which the package is imported once more, as ComfyUI imports a custom node."""
    name = "bonsai_second_import"
    package = Path(importlib.util.find_spec("bonsai_ops").origin).parent
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    yield name
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]
    gc.collect()
