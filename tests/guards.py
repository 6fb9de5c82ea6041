"""Remove the guards against known traps one by one: python -m tests.guards [--only TRAP ..] [--jobs N].

Each guard is a small change of the source that takes away what keeps a trap shut. It is made in a temporary copy of the
repository, never in the working tree, and the test of that trap must then fail. Prints a table; the exit code is 1 if a
removal goes unnoticed, 2 if a test fails already without one.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bonsai_ops.environment import COMFYUI_VERSIONS, PLUGIN, clean_environment, ensure_or_exit, home

MODEL_TESTS = "tests/host/model"
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.jpg", "*.png")
FAILED = 1
"""pytest's exit code for tests that failed."""


@dataclass(frozen=True)
class Guard:
    """What keeps a trap shut. `old` is replaced by `new` in `file`, once; `test`: file::test below MODEL_TESTS."""

    trap: str
    name: str
    file: str
    old: str
    new: str
    test: str


LINEAR, LAYOUT, LORA = "bonsai_ops/linear.py", "bonsai_ops/layout.py", "bonsai_ops/lora.py"
LOADER, SAVE, OPS, KLEIN = "bonsai_ops/loader.py", "bonsai_ops/save.py", "bonsai_ops/ops.py", "bonsai_ops/klein.py"
TRAPS = "test_traps.py::test_trap_"

GUARDS = (
    Guard("01", "side branch is added", LORA, "y.add_(change)", "y", f"{TRAPS}01_a_lora_is_no_silent_no_op"),
    Guard("01", "convert_weight", LINEAR, "def convert_weight(", "def _unused(", f"{TRAPS}01_a_merge_reads_the_values"),
    Guard("02", "packed patcher", LOADER, "    adopt(model)\n", "", f"{TRAPS}02_nothing_is_rounded_back_to_codes"),
    Guard(
        "02",
        "quantize refuses",
        LAYOUT,
        '        raise RuntimeError(\n            "a Bonsai weight is never requantized',
        '        return None, None\n        raise RuntimeError(\n            "a Bonsai weight is never requantized',
        f"{TRAPS}02_nothing_is_rounded_back_to_codes",
    ),
    Guard(
        "02",
        "patch hidden from dynamic VRAM",
        LINEAR,
        "return None if is_packed(self.weight) else self._dynamic_patch",
        "return self._dynamic_patch",
        f"{TRAPS}02_dynamic_vram_does_not_see_the_patch",
    ),
    Guard("03", "state_dict", LINEAR, "def state_dict(", "def _unused(", f"{TRAPS}03_the_state_dict_holds"),
    Guard("04", "weight_scale", LINEAR, "def weight_scale(", "def _unused(", f"{TRAPS}04_every_key_is_an_attribute"),
    Guard("04", "weight_zero", LINEAR, "def weight_zero(", "def _unused(", f"{TRAPS}04_every_key_is_an_attribute"),
    Guard(
        "05",
        "offloaded layers count as resident",
        LORA,
        "                module.comfy_patched_weights = True\n            yield",
        "                pass\n            yield",
        f"{TRAPS}05_an_offloaded_model_can_be_saved",
    ),
    Guard("06", "aten.linear", LAYOUT, "        (aten.linear.default, _linear),\n", "", f"{TRAPS}06_the_layout"),
    Guard("06", "aten.mm", LAYOUT, "        (aten.mm.default, _mm),\n", "", f"{TRAPS}06_the_layout"),
    Guard("06", "aten.addmm", LAYOUT, "        (aten.addmm.default, _addmm),\n", "", f"{TRAPS}06_the_layout"),
    Guard("06", "aten.t", LAYOUT, "        (aten.t.default, _transpose),\n", "", f"{TRAPS}06_the_layout"),
    Guard("07", "_apply", LINEAR, "def _apply(", "def _unused(", f"{TRAPS}07_a_layer_can_be_moved"),
    Guard(
        "07",
        "copy of an inference tensor",
        LINEAR,
        "moved = moved.clone()",
        "pass",
        f"{TRAPS}07_a_layer_can_be_moved",
    ),
    Guard(
        "08",
        "no memory in __init__",
        LINEAR,
        "        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias\n",
        "        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias\n"
        "        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)\n",
        f"{TRAPS}08_a_layer_is_made_without_memory",
    ),
    Guard(
        "09",
        "a fresh class a load",
        LINEAR,
        "def make_bonsai_ops() -> type:",
        "@__import__('functools').cache\ndef make_bonsai_ops() -> type:",
        f"{TRAPS}09_two_models_share_nothing",
    ),
    Guard(
        "09",
        "state on the instance",
        LINEAR,
        "        self.weight_function: list = []\n",
        "",
        f"{TRAPS}09_two_models_share_nothing",
    ),
    Guard(
        "10",
        "one parameter",
        LINEAR,
        '        for name in ("weight", "bias"):\n',
        '        self.register_buffer("scale", state_dict[prefix + "weight"].detach())\n'
        '        for name in ("weight", "bias"):\n',
        f"{TRAPS}10_a_packed_weight_is_one_parameter",
    ),
    Guard(
        "11",
        "uncast_bias_weight",
        LINEAR,
        "                y = branch.add_to(y, x, keep=resident)\n        comfy.ops.uncast_bias_weight(",
        "                y = branch.add_to(y, x, keep=resident)\n        (lambda *_: None)(",
        f"{TRAPS}11_casts_are_given_back",
    ),
    Guard(
        "11",
        "offloadable=True",
        LINEAR,
        "comfy.ops.cast_bias_weight(self, x, offloadable=True)",
        "(*comfy.ops.cast_bias_weight(self, x), None)",
        f"{TRAPS}11_casts_are_given_back",
    ),
    Guard("12", "logical dtype", LAYOUT, "orig_dtype=dtype,", "orig_dtype=torch.uint8,", f"{TRAPS}12_a_packed_weight"),
    Guard(
        "13",
        "silence about the bypass loader",
        "README.md",
        "\n## ",
        "\nUse LoraLoaderBypassModelOnly for LoRAs.\n\n## ",
        f"{TRAPS}13_the_bypass_loader",
    ),
    Guard(
        "14", "complete layout", LAYOUT, "def get_plain_tensors(", "def _unused(", f"{TRAPS}14_the_layout_is_complete"
    ),
    Guard("15", "halves swapped", KLEIN, "entry = _swap_halves(entry)", "pass", f"{TRAPS}15_norm_out_is_swapped"),
    Guard("16", "unknown keys refused", KLEIN, "    if extra:\n", "    if False:\n", f"{TRAPS}16_comfy_quant"),
    Guard(
        "17",
        "cached_patcher_init",
        LOADER,
        "    model.cached_patcher_init = ",
        "    _ = ",
        f"{TRAPS}17_a_model_can_be_made_again",
    ),
    Guard(
        "18",
        "512 tokens",
        "bonsai_ops/text_encoder.py",
        "MAX_TOKENS = 512",
        "MAX_TOKENS = 400",
        f"{TRAPS}18_a_prompt_has_512_tokens",
    ),
    Guard(
        "19", "layout once", LAYOUT, "    if known is not None:\n        return\n", "", f"{TRAPS}19_the_package_can_be"
    ),
    Guard(
        "19",
        "operators once",
        OPS,
        '    if hasattr(torch.ops.bonsai, "linear"):\n        return\n',
        "",
        f"{TRAPS}19_the_package_can_be",
    ),
    Guard(
        "20",
        "memory = classic",
        LOADER,
        'disable_dynamic=disable_dynamic or settings.memory == "classic"',
        "disable_dynamic=disable_dynamic",
        f"{TRAPS}20_dynamic_vram_can_be_turned_off",
    ),
    Guard(
        "lora",
        "matrices leave with the layer",
        LINEAR,
        "                branch.forget()\n",
        "                pass\n",
        "test_offload.py::test_the_matrices_of_a_lora_leave_with_the_layer",
    ),
    Guard(
        "lora",
        "ModelSave refuses a LoRA",
        LORA,
        "        if loras:\n",
        "        if False:\n",
        "test_merge_save.py::test_model_save_refuses_a_lora",
    ),
    Guard(
        "lora",
        "hooks give the weight back as it was",
        LORA,
        "            if not whitelist_keys_set or key in whitelist_keys_set:\n",
        "            if False:\n",
        "test_hooks.py::test_a_hook_equals_the_lora_itself",
    ),
    Guard(
        "merge",
        "our save node refuses a merge",
        SAVE,
        "    if any(merges_models(patches)",
        "    if False and any(merges_models(patches)",
        "test_merge_save.py::test_our_save_refuses_a_merge",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Tests every chosen guard; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guards", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TRAP", help="only these traps, such as 05 12 lora")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="tests at a time")
    arguments = parser.parse_args(argv)
    chosen = [g for g in GUARDS if not arguments.only or g.trap in arguments.only]
    environment = ensure_or_exit(tests=True, versions=COMFYUI_VERSIONS)
    comfyui = os.environ.get("BONSAI_COMFYUI") or str(environment.comfyui)
    variables = clean_environment(
        {
            "BONSAI_HOME": str(home()),
            "BONSAI_COMFYUI": comfyui,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bonsai-guards-") as temporary:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(max(1, arguments.jobs)):
            copy = Path(temporary) / str(number) / PLUGIN.name
            shutil.copytree(PLUGIN, copy, ignore=LEFT_BEHIND)
            copies.put(copy)
        runner = _Runner(environment.python, variables, copies)
        code, output = runner.run(sorted({g.test for g in chosen}))
        if code != 0:
            print(output)
            print("These tests fail without any guard removed: repair that first.", file=sys.stderr)
            return 2
        print(f"{'trap':5} {'guard':38} {'test':75} caught", flush=True)
        with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
            results = []
            for guard, caught in zip(chosen, pool.map(runner.is_caught, chosen), strict=True):
                print(f"{guard.trap:5} {guard.name:38} {guard.test:75} {'yes' if caught else 'NO'}", flush=True)
                results.append(caught)
    seconds = time.monotonic() - started
    print(f"{sum(results)} of {len(results)} removals caught on ComfyUI in {comfyui}, {seconds:.0f} s")
    return 0 if all(results) else 1


@dataclass(frozen=True)
class _Runner:
    """Runs tests in copies of the repository, one test run a copy at a time."""

    python: Path
    variables: dict[str, str]
    copies: queue.Queue[Path]

    def is_caught(self, guard: Guard) -> bool:
        """True if the guard's test fails without it. Raises ValueError if the source does not hold the guard once."""
        copy = self.copies.get()
        file = copy / guard.file
        whole = file.read_bytes()
        try:
            text = whole.decode("utf-8")
            if guard.old not in text:
                raise ValueError(f"{guard.file} has no {guard.old!r}: the guard {guard.name!r} must be described anew")
            file.write_bytes(text.replace(guard.old, guard.new, 1).encode("utf-8"))
            return self._pytest(copy, [guard.test])[0] == FAILED
        finally:
            file.write_bytes(whole)
            self.copies.put(copy)

    def run(self, tests: Sequence[str]) -> tuple[int, str]:
        """(exit code, output) of the tests in an unchanged copy."""
        copy = self.copies.get()
        try:
            return self._pytest(copy, tests)
        finally:
            self.copies.put(copy)

    def _pytest(self, copy: Path, tests: Sequence[str]) -> tuple[int, str]:
        files = sorted({f"{MODEL_TESTS}/{test.partition('::')[0]}" for test in tests})
        names = " or ".join(test.partition("::")[2] for test in tests)
        command = [str(self.python), "-m", "pytest", "--import-mode=importlib", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *files, "-k", names], cwd=copy, env=self.variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
