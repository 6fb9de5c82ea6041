"""Reading a torch pickle without running anything in it."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch

from ..device_errors import is_the_devices
from ..errors import PackError

DOWNLOAD_AGAIN = "It is damaged or its download was cut off: download it again."


def load_pickle(path: Path) -> dict:
    """The dict in a torch pickle, tensors mapped from disk. Only tensors and plain containers are unpickled.

    Raises PackError for any other file and for a pickle that holds or does anything else.
    """
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise PackError(
            path, f"is not a complete torch file ({size} bytes that do not end as a zip archive)", DOWNLOAD_AGAIN
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's text advises to switch its check off; only the name it objects to is passed on
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise PackError(
            path,
            f"holds more than tensors and was not opened{f' (it names {name[1]})' if name else ''}",
            "Only tensors are read from a pickle: get the pack from its publisher or use the MLX pack (safetensors).",
        ) from error
    except Exception as error:  # damaged bytes surface as any exception of the unpickler
        if is_the_devices(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PackError(path, f"is not a readable torch file ({reason.rstrip('. ')})", DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise PackError(path, f"holds a {type(content).__name__}", "Expected a dict of tensors.")
    return content
