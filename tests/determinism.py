"""Whether the same seed draws the same bits: python -m tests.determinism [--size 64] [--steps 1].

With the seedling, ternary and 1-bit, on the processor, by each backend in fp32 and bf16: twice in one process, in two
processes, with one thread and with two, alone and at both places of a batch of two. The same of decoding: by the
seedling's VAE, and by one of the published size with random weights. Prints a table; the exit code is 1 if two runs or
two processes differ. Threads and batches are measured only: how a product is cut into pieces, and so the
order of its sums, is up to the library that multiplies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bonsai_ops.tools.environment import PLUGIN, clean_environment, ensure_or_exit

PROMISED = ("again", "another process")
MEASURED = ("two threads", "first of two", "second of two")
BACKENDS = ("cpu", "eager")
DTYPES = ("fp32", "bf16")
PROMPT = "one orange bonsai in a black pot, mist, fallen leaves"


def drawn(comfyui: Path, base: Path, size: int, steps: int) -> dict[str, dict[str, str]]:
    """{what draws: {how: digest of what it made}} here, with as many threads as OMP_NUM_THREADS says."""
    sys.path[:0] = [str(comfyui), str(PLUGIN)]
    from bonsai_ops.tools.bench.inside import comfyui as host

    host.begin("cpu", arguments=["--base-directory", str(base)])
    import hashlib

    import torch

    from bonsai_ops import kernels
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.sampling import sample_official
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
    from bonsai_ops.host.vae import load_vae
    from bonsai_ops.tools import synthetic

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    seedling = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
    clip = load_bonsai_text_encoder(seedling)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))

    def digest(samples: Any) -> str:
        return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()

    def ways(once: Any, again: Any, pair: Any) -> dict[str, str]:
        kinds = {"once": once, "again": again, "first of two": pair[:1], "second of two": pair[1:]}
        return {kind: digest(samples) for kind, samples in kinds.items()}

    found: dict[str, dict[str, str]] = {}
    for name, path in (("ternary", seedling), ("1-bit", seedling / "binary.safetensors")):
        for dtype in DTYPES:
            model = load_bonsai_model(path, {"compute_dtype": dtype})
            for backend in BACKENDS:
                with kernels.use_backend(backend):
                    one, two = (
                        {"samples": torch.zeros(count, 128, size // 16, size // 16), "batch_index": [0] * count}
                        for count in (1, 2)
                    )
                    alone = [sample_official(model, positive, one, 7, steps, 1.0)["samples"] for _ in range(2)]
                    pair = sample_official(model, positive, two, 7, steps, 1.0)["samples"]
                found[f"{name}, {dtype}, {backend}"] = ways(*alone, pair)
    synthetic.write_vae(base / "vae")
    latent = torch.randn(1, 128, size // 16, size // 16, generator=torch.Generator().manual_seed(7))
    for name, path in (("seedling's VAE", seedling), ("FLUX.2's VAE", base)):
        vae = load_vae(path)
        with torch.inference_mode():  # as ComfyUI runs every node
            alone = [vae.decode(latent) for _ in range(2)]
            found[name] = ways(*alone, vae.decode(latent.repeat(2, 1, 1, 1)))
    return found


def compared(comfyui: Path, python: Path, size: int, steps: int) -> dict[str, dict[str, bool]]:
    """{what draws: {way of PROMISED and MEASURED: whether the bits are those of the first time}}."""
    told = []
    for threads in (1, 1, 2):
        with tempfile.TemporaryDirectory(prefix="bonsai-same-") as base:
            line = [str(python), "-m", "tests.determinism", "--inside", str(comfyui), base, str(size), str(steps)]
            variables = clean_environment({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
            done = subprocess.run(line, env=variables, cwd=PLUGIN, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            told.append(json.loads(done.stdout.splitlines()[-1]))
    first, second, threads = told
    return {
        name: {
            "again": ways["again"] == ways["once"],
            "another process": second[name] == ways,
            "two threads": threads[name]["once"] == ways["once"],
            "first of two": ways["first of two"] == ways["once"],
            "second of two": ways["second of two"] == ways["once"],
        }
        for name, ways in first.items()
    }


def table(found: dict[str, dict[str, bool]]) -> str:
    ways = (*PROMISED, *MEASURED)
    rows = [["", *ways], ["---"] * (len(ways) + 1)]
    rows += [[name, *("same" if same[way] else "other" for way in ways)] for name, same in found.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str]) -> int:
    """Draws in the private environment, prints the table and returns the exit code."""
    if argv[:1] == ["--inside"]:
        comfyui, base, size, steps = argv[1:]
        print(json.dumps(drawn(Path(comfyui), Path(base), int(size), int(steps))))
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.determinism", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="of the picture, in pixels (64)")
    parser.add_argument("--steps", type=int, default=1, help="(1)")
    arguments = parser.parse_args(argv)
    environment = ensure_or_exit(tests=True)
    comfyui = Path(os.environ.get("BONSAI_COMFYUI") or environment.comfyui)
    found = compared(comfyui, environment.python, arguments.size, arguments.steps)
    print(table(found))
    return int(not all(same[way] for same in found.values() for way in PROMISED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
