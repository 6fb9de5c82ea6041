"""A process with a ComfyUI of its own for tests/host/test_contract.py; prints one line of JSON.

python tests/contract_child.py COMFYUI_FOLDER BASE_DIRECTORY look {}
    what that ComfyUI lacks of the table in host/contract/
python tests/contract_child.py COMFYUI_FOLDER BASE_DIRECTORY without {"names": .., "hidden": .., "model": ..}
    what becomes of the plugin when each of the names is gone: taken from ComfyUI, or, if it is among `hidden`, hidden
    from the plugin alone. Several names need a system that can fork
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def look() -> dict[str, Any]:
    """{"versions", "gaps": [(what is gone and who needs it, what it costs)]}."""
    from contract_walk import unspelled

    from bonsai_ops.host import comfyui
    from bonsai_ops.host.contract import NEEDS

    gaps = list(comfyui.gaps())
    for need in NEEDS:
        if not any(gap.need is need for gap in gaps):
            gaps += [comfyui.Gap(f"{need.name}: {word}", need) for word in unspelled(need.name, need.words)]
    versions = f"ComfyUI {comfyui.version()}, comfy-kitchen {comfyui.kitchen_version()}"
    return {"versions": versions, "gaps": [(str(gap), gap.need.costs) for gap in gaps]}


def without(names: Sequence[str], hidden: Sequence[str], model: str) -> dict[str, Any]:
    """{name: as of `_without`}. ComfyUI is imported once, the plugin in a fork for each name, if there are several."""
    for module in ("comfy.sd", "comfy.taesd.taesd", "comfy_api.latest", "latent_preview", "nodes"):
        importlib.import_module(module)
    if len(names) == 1:
        return {name: _without(name, name in hidden, model) for name in names}
    return {name: _in_fork(name, name in hidden, model) for name in names}


def _in_fork(name: str, hide: bool, model: str) -> dict[str, Any]:
    """What `_without` returns in a fork of this process; {"error"} if that came to nothing."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w", encoding="utf-8") as out:
                json.dump(_without(name, hide, model), out)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process came to nothing", "lines": []}


def _without(name: str, hide: bool, model: str) -> dict[str, Any]:
    """{"error"} or {"nodes": registered, "drawn": a picture}, and {"lines": what was logged about the name}."""
    log = Lines()
    logging.getLogger().addHandler(log)
    pack = _pack()
    comfyui = importlib.import_module("pack.bonsai_ops.host.comfyui")
    if hide:
        find = comfyui.find

        def find_others(asked: str) -> Any:
            if asked == name:
                raise LookupError(name)
            return find(asked)

        comfyui.find = find_others
    else:
        parent, _, leaf = name.rpartition(".")
        delattr(comfyui.find(parent), leaf)
    try:
        extension = asyncio.run(pack.comfy_entrypoint())
    except ImportError as error:
        return {"error": f"{type(error).__name__}: {error}", "lines": []}
    asyncio.run(extension.on_load())
    nodes = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
    drawn = _draw(model)
    return {"nodes": len(nodes), "drawn": drawn, "lines": [line for line in log.lines if name in line]}


def _pack() -> ModuleType:
    """The plugin as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        "pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack


def _draw(path: str) -> bool:
    import torch

    load = importlib.import_module("pack.bonsai_ops.host.loader").load_bonsai_model
    sample = importlib.import_module("pack.bonsai_ops.host.sampling").sample_official
    text = torch.randn(1, 12, 128, generator=torch.Generator().manual_seed(1))
    positive = [[text, {"pooled_output": None}]]
    model = load(path, {"compute_dtype": "fp32"})
    samples = sample(model, positive, {"samples": torch.zeros(1, 128, 4, 6)}, 0, 2, 1.0)["samples"]
    return bool(samples.isfinite().all() and samples.std() > 0)


def main(folder: str, base: str, what: str, options: Mapping[str, Any]) -> None:
    """Puts ComfyUI first on the path, as conftest.py does, and prints what was asked for."""
    sys.path[:0] = [folder, str(REPOSITORY)]
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    importlib.import_module("comfy.options").enable_args_parsing()
    print(json.dumps(look() if what == "look" else without(**options)))


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
