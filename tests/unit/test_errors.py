"""What a user sees of an error: ComfyUI's dialog begins with its class."""

from __future__ import annotations

from bonsai_ops.weights.errors import PackError


def test_the_class_is_short() -> None:
    """It had the path of the plugin's folder before it, which left no room for the sentence."""
    assert f"{PackError.__module__}.{PackError.__qualname__}" == "bonsai.PackError"
