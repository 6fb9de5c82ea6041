"""`python -m bonsai_ops.bench [--memory | --layers | --step | --quantize | ..]`: one benchmark or several.

Without any of them: layers and step. Weights are random, sizes real. --device cuda measures a GPU with CUDA events and
copies of every weight that overrun its L2 cache. Joules are printed where the machine counts them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .tools.bench import table
from .tools.environment import ending_by_exception, ensure_or_exit, relaunch_if_needed


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen benchmarks (layers and step if none is chosen); returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    chosen = table.chosen(arguments)
    alone = next((benchmark for benchmark in chosen if benchmark.alone), None)
    arguments.device = arguments.device or ("cuda" if alone and alone.finds_python else "cpu")
    if not (alone and alone.finds_python):
        relaunch_if_needed("bonsai_ops.bench", given, arguments.yes)
    if alone:
        with ending_by_exception():
            return alone.measure(table.Run(arguments, arguments.work or Path(), given=given))
    from .tools.bench import machine, plot, report, timer  # torch is there only after the relaunch

    if arguments.device != "cpu":
        timer.require_gpu()
    figures: dict = {"machine": machine.describe(arguments.threads, arguments.device)}
    machine.show(figures["machine"])
    in_host = any(benchmark.in_host for benchmark in chosen)
    comfyui = ensure_or_exit(comfyui=arguments.comfyui).comfyui if in_host else None
    with ending_by_exception(), tempfile.TemporaryDirectory(prefix="bonsai-bench-") as temporary:
        run = table.Run(arguments, arguments.work or Path(temporary), comfyui)
        for benchmark in chosen:
            measured = benchmark.measure(run)
            figures |= measured if benchmark.at_the_top else {benchmark.name: measured}
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
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, help="write the figures to this file")
    out.add_argument("--csv", type=Path, help="write the tables to this file, or beside it if there are several")
    out.add_argument("--plot", type=Path, help="draw the figures into this PNG file")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, for gpu-check cuda")
    how.add_argument("--threads", type=int, help="threads torch computes with")
    how.add_argument(
        "--work",
        type=Path,
        help="folder for the synthetic packs (13 GB, of gpu-check 1.2 GB); default: a temporary one",
    )
    how.add_argument("--yes", action="store_true", help="download what this Python lacks without asking")
    how.add_argument("--comfyui", type=Path, help="use this ComfyUI folder and its Python")
    table.add_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
