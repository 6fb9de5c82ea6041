"""Hundreds of prompts on one server: python -m tests.soak [--prompts 500] [--size 128] [--steps 1].

A real ComfyUI on the processor draws with the seedling, ternary and 1-bit, with LoRAs, stock samplers and from
pictures; in between models are patched, calibrated, measured, recovered, trained and saved, prompts are cancelled, and
wrong ones are sent.
Every prompt is answered as it has to be, the same seed gives the same picture to the bit however often and between
whatever, and after the first 50 prompts the process takes no more memory, files and threads. Prints a table; the exit
code is 1 if something of that does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bonsai_ops.tools.environment import PLUGIN, clean_environment, ensure_or_exit, home, link_plugin, run_attached
from bonsai_ops.tools.server import ComfyServer, PromptInterruptedError

INSIDE = "BONSAI_SOAK"
"""Set in the process of the private environment."""
CYCLE = (
    *("ternary", "binary", "lora", "stock", "bad name", "picture", "ternary", "patch", "train", "binary"),
    *("cancel", "ternary", "fast", "bad text", "recover", "save", "picture", "lora", "ternary", "damaged"),
    *("binary", "stock", "cancel", "lora", "ternary"),
)
"""Kinds of prompts, again and again; how much memory is held is compared at the same place of it."""
SEEDS = 3
BASE = 2 * len(CYCLE)
"""Prompts after which all kinds were there twice: what comes later must not add anything."""
GROWTH = 0.03
LOOKS = 4
"""At open files and threads, the last ones, of which the least counts."""
SETTLES = 5.0
"""Seconds in which a connection that was just closed leaves a busy machine's count of files."""
PROMPT = "two green bonsai trees in blue pots, summer, blue sky"
LORA, DAMAGED = "seedling_night.safetensors", "soak-damaged.safetensors"
REFUSED = {
    "bad name": "Value not in list",
    "bad text": r"conditioning|text|Qwen3",
    "damaged": "download it again",
}
"""{kind: words that the answer to a wrong prompt has}."""
SYSTEM = Path("/proc/self/statm")


@dataclass
class Held:
    """What the server's process has: bytes of memory, open files, threads."""

    memory: int
    files: int
    threads: int


@dataclass
class Soak:
    """What came of the prompts. pictures: {what and which seed: digest}. wrong: a line for each that was not right."""

    size: int
    steps: int
    cycle: Sequence[str] = CYCLE
    seeds: int = SEEDS
    answered: Counter[str] = field(default_factory=Counter)
    pictures: dict[str, str] = field(default_factory=dict)
    same: int = 0
    held: list[Held] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, server: ComfyServer, prompts: int, said: Callable[[str], None] = lambda line: None) -> None:
        """Sends so many prompts, one after another; what is held is looked at after each whole cycle."""
        started = time.monotonic()
        for number in range(prompts):
            kind = self.cycle[number % len(self.cycle)]
            try:
                self._one(server, kind, number)
                self.answered[kind] += 1
            except Exception as error:  # the table tells it
                self.wrong.append(f"prompt {number}, {kind}: {type(error).__name__}: {str(error)[:600]}")
                if not alive(server):
                    break
            if (number + 1) % len(self.cycle) == 0:
                if SYSTEM.exists():
                    self.held.append(settled(server.pid, self.held[:1]))
                said(f"{number + 1} prompts, {self.held[-1] if self.held else ''}, wrong: {len(self.wrong)}")
        self.seconds = time.monotonic() - started

    def _one(self, server: ComfyServer, kind: str, number: int) -> None:
        seed = (number // len(self.cycle)) % self.seeds
        graph = GRAPHS[kind](self, seed, number)
        if kind in REFUSED:
            _refused(server, graph, REFUSED[kind])
            return
        if kind == "cancel":
            _cancelled(server, graph)
            return
        entry = server.wait(server.queue(graph), timeout=300)
        found = _digests(server, entry)
        for name, digest in found.items():
            known = self.pictures.setdefault(f"{kind} {seed} {name}", digest)
            if known != digest:
                raise AssertionError(f"seed {seed} drew another picture than before")
            self.same += 1
        if not found:
            raise AssertionError("nothing was drawn")

    def faults(self) -> list[str]:
        """What does not hold; in few prompts memory is not compared."""
        faults = list(self.wrong)
        if len(self.held) < 3:
            return faults
        first, last = self.held[BASE // len(CYCLE) - 1], self.held[-1]
        if last.memory > first.memory * (1 + GROWTH):
            faults.append(f"memory grew from {first.memory / 1e6:.0f} to {last.memory / 1e6:.0f} MB")
        for name in ("files", "threads"):  # some are open for a moment: what leaks is open at each look
            now = min(getattr(held, name) for held in self.held[-LOOKS:])
            if now > getattr(first, name):
                faults.append(f"{name} grew from {getattr(first, name)} to {now}")
        return faults

    def table(self) -> str:
        rows = [("prompts answered as they have to be", f"{sum(self.answered.values())}")]
        rows += [(f"  {kind}", str(count)) for kind, count in sorted(self.answered.items())]
        rows.append(("pictures and files that were drawn before, the same to the bit", str(self.same_again)))
        if self.held:
            first, last = self.held[min(BASE // len(CYCLE), len(self.held)) - 1], self.held[-1]
            growth = 100 * (last.memory / first.memory - 1)
            mb = [f"{held.memory / 1e6:.0f} MB" for held in (first, last)]
            rows.append((f"memory after {BASE} and after all", f"{mb[0]}, {mb[1]} ({growth:+.1f} %)"))
            for name, title in (("files", "open files"), ("threads", "threads")):
                looks = [getattr(held, name) for held in self.held]
                rows.append((title, f"{min(looks)} to {max(looks)}"))
        rows.append(("seconds", f"{self.seconds:.0f}"))
        return "\n".join(f"| {name} | {value} |" for name, value in (("", ""), ("---", "---"), *rows))

    @property
    def same_again(self) -> int:
        """How many were compared with an earlier one."""
        return self.same - len(self.pictures)


def held_by(process: int) -> Held:
    """Of a process of Linux, now."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    counts = [len(os.listdir(folder / name)) for name in ("fd", "task")]
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), *counts)


def settled(process: int, before: Sequence[Held]) -> Held:
    """What a process has as soon as it has no more files than before, or after SETTLES."""
    until = time.monotonic() + SETTLES
    while True:
        held = held_by(process)
        if time.monotonic() > until or all(held.files <= known.files for known in before):
            return held
        time.sleep(0.1)


def alive(server: ComfyServer) -> bool:
    try:
        server.get("/queue")
    except (OSError, RuntimeError):
        return False
    return True


def _digests(server: ComfyServer, entry: Mapping[str, Any]) -> dict[str, str]:
    """{node: sha256} of what the nodes of a prompt wrote, which is deleted."""
    from PIL import Image

    found = {}
    for node, output in entry["outputs"].items():
        for image in output.get("images") or ():
            path = server.base_directory / image["type"] / image.get("subfolder", "") / image["filename"]
            if node == "image":
                with Image.open(path) as picture:
                    found[node] = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
            path.unlink()
        if node == "save":
            path = Path(output["text"][0])
            found[node] = hashlib.sha256(_data_of(path)).hexdigest()
            path.unlink()
    return found


def _data_of(path: Path) -> bytes:
    """The tensors of a .safetensors file, without the header, which holds the prompt."""
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def _refused(server: ComfyServer, graph: Mapping[str, dict], words: str) -> None:
    try:
        server.wait(server.queue(graph), timeout=300)
    except PromptInterruptedError:
        raise
    except RuntimeError as error:
        if not re.search(words, str(error)):
            raise
        return
    raise AssertionError("a wrong prompt was drawn")


def _cancelled(server: ComfyServer, graph: Mapping[str, dict]) -> None:
    """It ends soon after Cancel, however far it was."""
    asked = [0.0]

    def cancel(seconds: float, state: str) -> None:
        if state != "queued":
            server.interrupt()
            asked[0] = asked[0] or time.monotonic()

    try:
        server.wait(server.queue(graph), timeout=120, on_progress=cancel)
    except PromptInterruptedError:
        if time.monotonic() - asked[0] > 30:
            raise AssertionError("it went on for half a minute after Cancel") from None
        return
    raise AssertionError("it was not cancelled")


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _drawing(soak: Soak, seed: int, number: int, **changed: Any) -> dict[str, dict]:
    """The seedling's picture; changed: {name: node}. Its name is new, so that ComfyUI saves it again."""
    loading = {"compute_dtype": "auto", "memory": "auto"}
    return {
        "pack": _node("LoadBonsaiPack", pack_name="seedling", **loading),
        "text": _node("CLIPTextEncode", clip=["pack", 1], text=PROMPT),
        "empty": _node("EmptyFlux2LatentImage", width=soak.size, height=soak.size, batch_size=1),
        "sampler": _node(
            "BonsaiSampler",
            model=["pack", 0],
            positive=["text", 0],
            latent=["empty", 0],
            seed=seed,
            steps=soak.steps,
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["pack", 2]),
        "image": _node("SaveImage", images=["decode", 0], filename_prefix=f"soak/{number}"),
        **changed,
    }


def _with(graph: dict[str, dict], **inputs: Any) -> dict[str, dict]:
    """The graph with other inputs of its sampler."""
    graph["sampler"]["inputs"] |= inputs
    return graph


def _loaded(soak: Soak, seed: int, number: int, name: str, layout: str = "compact") -> dict[str, dict]:
    loader = _node("LoadBonsaiModel", model_name=name, compute_dtype="auto", memory="auto", layout=layout)
    return _with(_drawing(soak, seed, number, model=loader), model=["model", 0])


def _lora(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    lora = _node("LoraLoaderModelOnly", model=["pack", 0], lora_name=LORA, strength_model=1.0)
    return _with(_drawing(soak, seed, number, lora=lora), model=["lora", 0])


def _stock(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    graph = _drawing(soak, seed, number)
    given = {"model": ["pack", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    how = {"steps": soak.steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph["sampler"] = _node("KSampler", seed=seed, **given, **how)
    return graph


def _picture(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    flat = _node("EmptyImage", width=soak.size, height=soak.size, batch_size=1, color=0x4080C0)
    encoded = _node("VAEEncode", pixels=["flat", 0], vae=["pack", 2])
    graph = _drawing(soak, seed, number, flat=flat, encoded=encoded)
    return _with(graph, latent=["encoded", 0], denoise=0.8, steps=max(2, soak.steps))


def _save(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    graph = _lora(soak, seed, number)
    graph["save"] = _node("SaveBonsaiModel", model=["lora", 0], filename_prefix=f"soak/{number}", include_loras=True)
    return graph


def _patch(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    """A small dense model of random weights is calibrated, patched, measured and drawn with."""
    import tiny_files

    how = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": seed}
    given = {"positive": ["text", 0], "negative": ["text", 0], "latent": ["empty", 0]}
    graph = _drawing(
        soak,
        seed,
        number,
        dense=_node("UNETLoader", unet_name=tiny_files.DENSE, weight_dtype="default"),
        seen=_node("CalibrateBitLinear", model=["dense", 0], mode=("power", "full")[seed % 2], **given, **how),
        patched=_node(
            "PatchToBitLinear",
            model=["dense", 0],
            scheme="ternary",
            group_size="128",
            rank=4 * seed,
            target_size_mb=0,
            include="*",
            exclude="img_in*, txt_in*, *modulation*, final_layer*, time_in*",
            dry_run=False,
            calibration=["seen", 0],
        ),
        measured=_node("MeasureBitLinear", original=["dense", 0], patched=["patched", 0], **given, **how),
        about=_node("BonsaiModelInfo", model=["patched", 0]),
        told=_node("PreviewAny", source=["measured", 0]),
        told_about=_node("PreviewAny", source=["about", 0]),
    )
    graph["pack"]["inputs"]["pack_name"] = tiny_files.PACK
    return _with(graph, model=["patched", 0])


def _recover(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    """What is patched learns two steps long from four points of the dense model."""
    graph = _patch(soak, seed, number)
    graph["patched"]["inputs"]["rank"] = 4
    graph["sigmas"] = _node("Flux2Scheduler", steps=2, width=soak.size, height=soak.size)
    models = {"original": ["dense", 0], "patched": ["patched", 0], "prompts": ["text", 0], "latent": ["empty", 0]}
    numbers = {"seed": seed, "points": 4, "steps": 2, "batch": 1, "learning_rate": 1e-3, "minutes": 0.0}
    graph["recovered"] = _node("RecoverBitLinear", **models, sigmas=["sigmas", 0], **numbers)
    return _with(graph, model=["recovered", 0])


def _train(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    """A LoRA is trained on the dense model for one step and drawn with on the pack."""
    import tiny_files

    given = {"model": ["right", 0], "latents": ["empty", 0], "positive": ["text", 0]}
    numbers = {
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": 1,
        "learning_rate": 1e-3,
        "rank": 2,
        "seed": seed,
    }
    kinds = {"optimizer": "SGD", "loss_function": "MSE", "training_dtype": "fp32", "lora_dtype": "fp32"}
    ways = {"algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1, "existing_lora": "[None]"}
    off = dict.fromkeys(("quantized_backward", "offloading", "bucket_mode"), False)
    graph = _drawing(
        soak,
        seed,
        number,
        dense=_node("UNETLoader", unet_name=tiny_files.DENSE, weight_dtype="default"),
        right=_node("BonsaiRightGradients", model=["dense", 0]),
        trained=_node("TrainLoraNode", **given, **numbers, **kinds, **ways, **off, bypass_mode=True),
        lora=_node("LoraModelLoader", model=["pack", 0], lora=["trained", 0], strength_model=1.0, bypass=False),
    )
    graph["pack"]["inputs"]["pack_name"] = tiny_files.PACK
    return _with(graph, model=["lora", 0])


def _bad_text(soak: Soak, seed: int, number: int) -> dict[str, dict]:
    import tiny_files

    other = _node("LoadBonsaiPack", pack_name=tiny_files.PACK, compute_dtype="auto", memory="auto")
    graph = _drawing(soak, seed, number, other=other)
    graph["text"]["inputs"]["clip"] = ["other", 1]
    return graph


GRAPHS: dict[str, Callable[[Soak, int, int], dict[str, dict]]] = {
    "ternary": _drawing,
    "binary": lambda *how: _loaded(*how, "seedling/binary.safetensors"),
    "fast": lambda *how: _loaded(*how, "seedling/transformer/diffusion_pytorch_model.safetensors", "fast"),
    "lora": _lora,
    "stock": _stock,
    "picture": _picture,
    "patch": _patch,
    "recover": _recover,
    "train": _train,
    "save": _save,
    "cancel": lambda soak, seed, number: _with(_drawing(soak, 1000 + number, number), steps=100),
    "bad name": lambda *how: _loaded(*how, "soak-not-there.safetensors"),
    "bad text": _bad_text,
    "damaged": lambda *how: _loaded(*how, DAMAGED),
}


@contextlib.contextmanager
def written(base: Path) -> Iterator[None]:
    """Within it a server with this base directory has the tiny files, and a model that was cut off."""
    import tiny_files

    with tiny_files.written(base):
        whole = base / "models" / "diffusion_models" / tiny_files.MODEL
        damaged = whole.with_name(DAMAGED)
        damaged.write_bytes(whole.read_bytes()[:-1000])
        try:
            yield
        finally:
            damaged.unlink()


def main(argv: Sequence[str]) -> int:
    """Runs the prompts in the private environment, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=500, help="how many (500)")
    parser.add_argument("--size", type=int, default=128, help="of the pictures, in pixels (128)")
    parser.add_argument("--steps", type=int, default=1, help="of most pictures (1)")
    arguments = parser.parse_args(argv)
    environment = ensure_or_exit(tests=True)
    if INSIDE not in os.environ:
        variables = {INSIDE: "1", "BONSAI_HOME": str(home())}
        return run_attached(
            [str(environment.python), "-m", "tests.soak", *argv], clean_environment(variables), cwd=PLUGIN
        )
    sys.path.append(str(PLUGIN / "tests"))
    soak = Soak(arguments.size, arguments.steps)
    base = Path(tempfile.mkdtemp(prefix="bonsai-soak-"))
    comfyui = Path(os.environ.get("BONSAI_COMFYUI") or environment.comfyui)
    try:
        link_plugin(base)
        with ComfyServer(environment.python, comfyui, base) as server, written(base):
            soak.run(server, arguments.prompts, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(soak.table())
    for fault in soak.faults():
        print(f"WRONG: {fault}")
    return int(bool(soak.faults()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
