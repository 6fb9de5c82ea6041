"""The list of stages: what each may take, where its code is, and the ComfyUI it runs in."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = tuple(
    f"{codec}:{mode}"
    for codec in ("trit5", "crumb", "bit")
    for mode in ("exact", "fp16_accumulate", "a8", "a8_fp8")
    if codec != "trit5" or not mode.startswith("a8")
)


@dataclass(frozen=True)
class Process:
    """One process. module: of this package, its `run(check, part)` is called. comfyui: dynamic, classic or not at all.

    on_cpu: the CPU computes, whatever --device says. cold: nothing that Triton compiled before is used.
    """

    name: str
    module: str
    part: str = ""
    comfyui: str | None = None
    on_cpu: bool = False
    cold: bool = False


@dataclass(frozen=True)
class Stage:
    """Processes that run side by side; `seconds` is what they may take on an H100 or H200."""

    seconds: float
    processes: tuple[Process, ...]


STAGES = {
    "env": Stage(45, (Process("env", "env"),)),
    "kernels": Stage(
        75,
        (
            *(Process(f"kernels:{part}", "kernels", part) for part in KERNELS),
            Process("kernels:candidates", "trials"),
            Process("kernels:paths", "paths"),
            Process("kernels:geforce", "geforce"),
            Process("seedling:truth", "seedling", "truth", comfyui="classic", on_cpu=True),
        ),
    ),
    "speed": Stage(85, (Process("speed", "speed"),)),
    "seedling": Stage(70, (Process("seedling", "seedling", comfyui="dynamic"),)),
    "dynamic": Stage(100, (Process("dynamic", "transformer", "dynamic", comfyui="dynamic", cold=True),)),
    "classic": Stage(100, (Process("classic", "transformer", "classic", comfyui="classic"),)),
    "compile": Stage(80, (Process("compile", "compiled", comfyui="dynamic"),)),
    "bench": Stage(60, (Process("bench", "project", "bench"),)),
    "tests": Stage(90, (Process("tests", "project", "tests"),)),
}
USUAL = ("env", "kernels", "speed", "seedling", "dynamic", "classic", "compile")
PROCESSES = {process.name: process for stage in STAGES.values() for process in stage.processes}
