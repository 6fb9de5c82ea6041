"""Reading a torch pickle without running anything in it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from ..errors import PackError


def load_pickle(path: Path) -> dict:
    """The dict in a torch pickle, tensors mapped from disk. Only tensors and plain containers are unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise PackError(
            path,
            f"holds more than tensors and was not opened ({str(error).splitlines()[0]})",
            "Only tensors are read from a pickle: get the pack from its publisher or use the MLX pack (safetensors).",
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise PackError(
            path,
            f"is not a readable torch file ({str(error).splitlines()[0]})",
            "It is damaged or its download was cut off: download it again.",
        ) from error
    if not isinstance(content, dict):
        raise PackError(path, f"holds a {type(content).__name__}", "Expected a dict of tensors.")
    return content
