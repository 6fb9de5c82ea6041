"""Import gemlite on a machine without a GPU.

gemlite reads the device when it is imported: `torch.cuda.get_device_capability()` and `get_device_properties()` (name,
multi_processor_count), and `triton.runtime.driver.active` (target backend, shared memory). `import_gemlite` answers
with a made-up sm_80 device for the length of the import and puts everything back, so that no later code believes in the
device. gemlite's packer (`GemLiteLinear.pack`) and its torch unpackers are plain CPU code after that; its kernels stay
unusable.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

DEVICE = {"name": "made-up sm_80", "major": 8, "minor": 0, "multi_processor_count": 108, "max_shared_mem": 166912}


class _Driver:
    """The part of a Triton driver that gemlite asks at import."""

    utils = SimpleNamespace(get_device_properties=lambda _index: {"max_shared_mem": DEVICE["max_shared_mem"]})

    def get_current_target(self) -> SimpleNamespace:
        return SimpleNamespace(backend="cuda", arch=80, warp_size=32)

    def get_benchmarker(self) -> Any:
        raise RuntimeError("the made-up device cannot run kernels")


@contextmanager
def _pretended_device() -> Iterator[None]:
    import triton
    from triton.runtime import _allocation

    driver = triton.runtime.driver
    active, allocator = driver._active, _allocation._allocator.get()
    driver.set_active(_Driver())
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_capability", lambda _device=None: (8, 0)),
            mock.patch.object(torch.cuda, "get_device_properties", lambda _device=None: SimpleNamespace(**DEVICE)),
            mock.patch.object(torch.cuda, "device_count", lambda: 0),
        ):
            yield
    finally:
        driver.set_active(active)
        triton.set_allocator(allocator)


def import_gemlite() -> ModuleType:
    """Return the gemlite module, imported with a made-up device where there is no real one.

    Raises ImportError (gemlite or Triton not installed).
    """
    if "gemlite" in sys.modules:
        return sys.modules["gemlite"]
    if torch.cuda.is_available():
        return importlib.import_module("gemlite")
    with _pretended_device():
        return importlib.import_module("gemlite")
