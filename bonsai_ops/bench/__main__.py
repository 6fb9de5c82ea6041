"""`python -m bonsai_ops.bench [--memory | --layers | --step | --lora | --static] [--json FILE]`.

--memory  sizes, load time and peak memory of synthetic 4B packs in the real host, beside a dense bf16 file
--layers  every linear layer of the 4B model: ours, dense bf16, dense fp32 and unpacking the whole layer at each call
--step    one sampling step of the 4B model in the real host: ours, a dense model in bf16, stock ComfyUI
--lora    what a LoRA on every linear layer costs a step in the real host: ours, a dense model in bf16
--static  every GPU kernel compiled for ten GPUs without one: registers, spills, instructions, beside gemlite's
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ..environment import ensure_or_exit, relaunch_if_needed

BENCHMARKS = ("memory", "layers", "step", "lora")


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen benchmarks (layers and step if none is chosen); returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bonsai_ops.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in BENCHMARKS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--work", type=Path, help="folder for the synthetic packs (13 GB); default: a temporary one")
    parser.add_argument("--comfyui", type=Path, help="use this ComfyUI folder and its Python")
    parser.add_argument("--no-dense", action="store_true", help="memory: leave out the dense bf16 file (7.75 GB)")
    parser.add_argument("--tokens", type=int, default=1536, help="layers: rows of the activations (1536: 512x512)")
    parser.add_argument("--size", type=int, default=512, help="step, lora: width and height in pixels")
    parser.add_argument("--rank", type=int, default=16, help="lora: rank of the LoRA")
    parser.add_argument("--threads", type=int, help="threads torch computes with")
    arguments = parser.parse_args(given)
    relaunch_if_needed("bonsai_ops.bench", given)
    if arguments.static:
        from .static import run_static

        return run_static(arguments.json)
    chosen = [name for name in BENCHMARKS if getattr(arguments, name)] or ["layers", "step"]
    from . import layers, memory, report, step  # torch is there only after the relaunch

    figures: dict = {"machine": report.machine(arguments.threads)}
    report.show_machine(figures["machine"])
    with tempfile.TemporaryDirectory(prefix="bonsai-bench-") as temporary:
        work = arguments.work or Path(temporary)
        if "memory" in chosen:
            comfyui = ensure_or_exit(comfyui=arguments.comfyui).comfyui
            figures |= memory.measure(comfyui, work, dense=not arguments.no_dense)
        if "layers" in chosen:
            figures["layers"] = layers.measure(arguments.tokens)
        if "step" in chosen:
            comfyui = ensure_or_exit(comfyui=arguments.comfyui).comfyui
            figures["step"] = step.measure(comfyui, work, arguments.size)
        if "lora" in chosen:
            comfyui = ensure_or_exit(comfyui=arguments.comfyui).comfyui
            figures["lora"] = step.measure_lora(comfyui, work, arguments.size, arguments.rank)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
