"""`python -m bonsai_ops.bench [--memory | --layers | --step | --quantize | ..]`: one benchmark or several.

--memory   sizes, load time and peak memory of synthetic 4B packs in the real host, beside a dense bf16 file
--layers   every linear layer of the 4B model: ours exact (ternary compact, ternary in 2-bit planes, 1-bit) and with
           int8 activations, beside dense bf16, dense fp32, unpacking the whole layer at each call and, on a GPU,
           gemlite: speed, bytes, measured scratch memory, error against float64
--sweep    cost of the layers against the number of tokens, 256 to 4608
--step     one sampling step of the 4B model in the real host: ours, a dense model in bf16, without and with our way to
           attend on a CPU, and stock ComfyUI
--lora     what a LoRA on every linear layer costs a step in the real host: ours, a dense model in bf16
--profile  where one step in the real host goes, operation by operation, and whose code asks for it
--picture  a whole picture part by part: text encoder, 4 steps, VAE decode; --sdcpp adds stable-diffusion.cpp
--quantize what Patch to BitLinear takes for a dense 4B model in the real host: minutes, peak memory, sizes
--static   every GPU kernel compiled for ten GPUs without one: registers, spills, instructions, beside gemlite's

Without any of them: layers and step. Weights are random, sizes real. --device cuda measures a GPU with CUDA events and
copies of every weight that overrun its L2 cache. Joules are printed where the machine counts them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .tools.environment import ensure_or_exit, relaunch_if_needed

BENCHMARKS = ("memory", "layers", "sweep", "step", "lora", "profile", "picture", "quantize")
IN_HOST = ("memory", "step", "lora", "profile", "picture", "quantize")


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen benchmarks (layers and step if none is chosen); returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    relaunch_if_needed("bonsai_ops.bench", given)
    if arguments.static:
        from .tools.bench.static import run_static

        return run_static(arguments.json)
    chosen = [name for name in BENCHMARKS if getattr(arguments, name)] or ["layers", "step"]
    from .tools.bench import machine, plot, report, timer  # torch is there only after the relaunch

    if arguments.device != "cpu":
        timer.require_gpu()
    figures: dict = {"machine": machine.describe(arguments.threads, arguments.device)}
    machine.show(figures["machine"])
    comfyui = ensure_or_exit(comfyui=arguments.comfyui).comfyui if set(chosen) & set(IN_HOST) else Path()
    with tempfile.TemporaryDirectory(prefix="bonsai-bench-") as temporary:
        work = arguments.work or Path(temporary)
        for name in chosen:
            measured = _measure(name, arguments, comfyui, work)
            figures |= measured if name == "memory" else {name: measured}
    if arguments.device != "cpu":
        figures["machine"]["clock_after"] = machine.gpu_clock()
        print(f"clock after the runs: {figures['machine']['clock_after']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if arguments.csv:
        for file in report.write_csv(arguments.csv, figures):
            print(f"wrote {file}")
    if arguments.plot and plot.draw(arguments.plot, figures):
        print(f"wrote {arguments.plot}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bonsai_ops.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in (*BENCHMARKS, "static"):
        parser.add_argument(f"--{name}", action="store_true")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, help="write the figures to this file")
    out.add_argument("--csv", type=Path, help="write the tables to this file, or beside it if there are several")
    out.add_argument("--plot", type=Path, help="draw the figures into this PNG file")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--threads", type=int, help="threads torch computes with")
    how.add_argument("--work", type=Path, help="folder for the synthetic packs (13 GB); default: a temporary one")
    how.add_argument("--comfyui", type=Path, help="use this ComfyUI folder and its Python")
    how.add_argument("--no-dense", action="store_true", help="memory: leave out the dense bf16 file (7.75 GB)")
    how.add_argument("--tokens", type=int, default=1536, help="layers: rows of the activations (1536: 512x512)")
    how.add_argument("--rounds", type=int, default=5, help="layers: timed calls of every way")
    how.add_argument("--size", type=int, default=512, help="step, lora, profile, picture: width and height in pixels")
    how.add_argument("--rank", type=int, default=16, help="lora: rank of the LoRA")
    how.add_argument(
        "--mode",
        nargs="+",
        default=["exact"],
        help="step: more modes to measure beside exact; profile, picture: the mode (exact, fp16_accumulate, a8)",
    )
    how.add_argument(
        "--layout",
        choices=("compact", "fast"),
        default="compact",
        help="step, profile, picture: how ternary weights lie in memory",
    )
    how.add_argument("--ways", nargs="+", help="quantize: some of ternary, rank32, mix; default: all of them")
    rival = parser.add_argument_group("stable-diffusion.cpp, for --picture")
    rival.add_argument("--sdcpp", type=Path, help="its sd-cli")
    rival.add_argument("--sdcpp-model", type=Path, help="the transformer it loads (.gguf or .safetensors)")
    rival.add_argument("--sdcpp-llm", type=Path, help="the Qwen3 4B it loads")
    rival.add_argument("--sdcpp-vae", type=Path, help="the FLUX.2 VAE it loads")
    rival.add_argument(
        "--sdcpp-argument", action="append", default=[], help="a further argument for it, such as =--diffusion-fa"
    )
    return parser


def _measure(name: str, arguments: argparse.Namespace, comfyui: Path, work: Path) -> dict | list[dict]:
    """Runs one benchmark; its figures."""
    from .tools.bench import layers, memory, picture, profile, quantize, step, sweep

    size, device, layout = arguments.size, arguments.device, arguments.layout
    mode = arguments.mode[0]
    if name == "memory":
        return memory.measure(comfyui, work, dense=not arguments.no_dense)
    if name == "layers":
        return layers.measure(arguments.tokens, device, arguments.rounds)
    if name == "sweep":
        return sweep.measure(device)
    if name == "step":
        return step.measure(comfyui, work, size, arguments.mode, layout, device)
    if name == "lora":
        return step.measure_lora(comfyui, work, size, arguments.rank, device)
    if name == "profile":
        return profile.measure(comfyui, work, size, mode, layout, device)
    if name == "quantize":
        return quantize.measure(comfyui, work, arguments.ways, device)
    return picture.measure(comfyui, work, size, mode, layout, device, _sdcpp(arguments))


def _sdcpp(arguments: argparse.Namespace) -> object:
    """What --sdcpp and its options describe, None without them. Ends the program if one is missing."""
    from .tools.bench.picture import Sdcpp

    if arguments.sdcpp is None:
        return None
    files = {name: getattr(arguments, f"sdcpp_{name}") for name in ("model", "llm", "vae")}
    missing = [f"--sdcpp-{name}" for name, file in files.items() if file is None]
    if missing:
        raise SystemExit(f"--sdcpp also needs {', '.join(missing)}")
    for file in (arguments.sdcpp, *files.values()):
        if not file.is_file():
            raise SystemExit(f"{file} is not there: --sdcpp and its options name files")
    return Sdcpp(arguments.sdcpp, **files, arguments=tuple(arguments.sdcpp_argument))


if __name__ == "__main__":
    raise SystemExit(main())
