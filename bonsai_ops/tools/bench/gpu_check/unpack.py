"""Lays out what a bare machine's `.gpu` brought: Python packages in /tmp/site, ComfyUI in /tmp/comfyui.

    python -m bonsai_ops.tools.bench.gpu_check.unpack [FOLDER WITH THE ARCHIVES [FOLDER FOR BOTH, not /tmp]]

Beside that it writes one .pth file, so that child processes with a clean environment find the packages too, after the
machine's own. If the archive's comfy-kitchen, built for few GPUs, does not work here, its CUDA library is taken away
and comfy-kitchen uses Triton.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

from ...environment import PLUGIN

SITE, COMFYUI = "site.tar.xz", "comfyui.tar.xz"
ARCHIVES = {SITE: Path("/tmp/site"), COMFYUI: Path("/tmp/comfyui")}
STUB = Path(__file__).resolve().parent / "stub"
PROBE = """
import torch, comfy_kitchen
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(1, 2, 8, 64, device=device, dtype=torch.bfloat16)
turn = torch.eye(2, device=device).expand(1, 1, 8, 32, 2, 2).contiguous()
q, k = comfy_kitchen.apply_rope(x, x, turn)
if device == "cuda":
    torch.cuda.synchronize()
assert (q - x).abs().max() < 1e-2
print("comfy-kitchen works on", device)
"""


def main(argv: list[str]) -> int:
    """Unpacks and tries comfy-kitchen. Raises SystemExit where an archive is missing."""
    folder = Path(argv[0]) if argv else PLUGIN / ".gpu"
    targets = {name: Path(argv[1]) / target.name if argv[1:] else target for name, target in ARCHIVES.items()}
    missing = [name for name in ARCHIVES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {' and no '.join(missing)}: put the archives there or name their folder.")
    begun = time.perf_counter()
    for name, target in targets.items():
        with tarfile.open(folder / name) as archive:
            archive.extractall(target, filter="data")
    pth = Path(sysconfig.get_paths()["purelib"]) / "bonsai_gpu_check.pth"
    pth.write_text(f"{targets[SITE]}\n{STUB}\n", encoding="utf-8")
    print(f"unpacked in {time.perf_counter() - begun:.1f} s, {pth}", flush=True)
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=90)
    print(done.stdout.strip() or done.stderr[-600:], flush=True)
    if done.returncode:
        for file in (targets[SITE] / "comfy_kitchen" / "backends" / "cuda").glob("*.so"):
            file.unlink()
        print("comfy-kitchen's CUDA library did not work and was removed", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
