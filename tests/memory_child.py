"""Memory runs out at some points of loading, drawing and patching: memory_child.py COMFYUI_FOLDER BASE_DIRECTORY.

The limit is the real one of addresses (RLIMIT_AS), a few more bytes each time. Prints one line of JSON:
{work: {"failed": how often, "wrong": [what was raised that does not say that it was memory], "other": whether work gave
other bits when it was done again without a limit}}.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
M_MMAP_THRESHOLD = -3
ROOM = (0, 1 << 19, 1 << 21, 1 << 23)
"""Bytes beyond what the process has."""


def limited(nbytes: int | None) -> None:
    """Lets the process have so many bytes more, or as many as before."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if nbytes is None else held + nbytes, most))


def fault_of(error: BaseException) -> str:
    """What is wrong with an error that memory caused, empty if nothing."""
    from bonsai_ops.weights.device_errors import is_the_devices
    from bonsai_ops.weights.errors import PackError

    told = is_the_devices(error) or (isinstance(error, PackError) and "Cannot allocate memory" in str(error))
    return "" if told and "ownload" not in str(error) else f"{type(error).__name__}: {error}"[:400]


def tried(work: Callable[[], Any]) -> dict[str, Any]:
    """What becomes of work, which returns tensors, under each limit."""
    import torch

    expected, failed, wrong, other = work(), 0, set(), False
    for nbytes in ROOM:
        gc.collect()
        try:
            limited(nbytes)
            work()
        except BaseException as error:
            limited(None)
            failed += 1
            wrong |= {fault_of(error)} - {""}
        finally:
            limited(None)
    other = not all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))
    return {"failed": failed, "wrong": sorted(wrong), "other": other}


def main(comfyui: Path, base: Path) -> dict[str, Any]:
    sys.path[:0] = [str(comfyui), str(REPOSITORY), str(REPOSITORY / "tests")]
    from bonsai_ops.tools.bench.inside import comfyui as host

    host.begin("cpu", arguments=["--base-directory", str(base)])
    import torch
    import twins

    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.patch import PatchOptions, patch_model
    from bonsai_ops.tools import synthetic
    from bonsai_ops.weights import flux2

    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):  # of the C library: large blocks come from the system each time
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    geometry = flux2.Geometry(hidden=384, context=128, in_channels=128, double_blocks=1, single_blocks=1)
    packs = [base / "model.safetensors", base / "state_dict.pt"]
    synthetic.write_mlx(packs[0], "ternary", geometry)
    synthetic.write_gemlite(packs[1], "ternary", geometry)

    def load(path: Path) -> Any:
        return load_bonsai_model(path, {"compute_dtype": "fp32"})

    def state(model: Any) -> list[Any]:
        return [getattr(tensor, "_qdata", tensor).detach().clone() for tensor in model.model.state_dict().values()]

    found = {f"load {path.name}": tried(lambda path=path: state(load(path))) for path in packs}
    model, dense = load(packs[0]), twins.load_stock(twins.read_dense(packs[0]))
    large = {"samples": torch.zeros(1, 128, 16, 16)}
    found["draw"] = tried(lambda: [twins.draw(model, start=large, steps=1)])
    found["patch"] = tried(lambda: state(patch_model(dense, PatchOptions())[0]))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
