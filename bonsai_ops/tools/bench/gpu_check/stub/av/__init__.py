"""Stands in for PyAV where no video is read or written: every name exists, none can be used."""

from __future__ import annotations

import sys
import types

__version__ = "19.0.2"
PARTS = ("container", "subtitles", "subtitles.stream", "video", "video.reformatter", "audio", "logging", "error")


class _Missing(type):
    def __getattr__(cls, name: str) -> type:
        return __getattr__(name)


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        made = __getattr__(name)
        setattr(self, name, made)
        return made


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name, (), {})


if __name__ == "av":  # not where it is imported by its place in the project
    for _name in PARTS:
        _module = _Module(f"av.{_name}")
        _module.__path__ = []
        sys.modules[f"av.{_name}"] = _module
        _parent, _, _leaf = _name.rpartition(".")
        setattr(sys.modules[f"av.{_parent}" if _parent else __name__], _leaf, _module)
