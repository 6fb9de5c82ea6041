"""Points of samplings: what went into a model, and which way it went from there. Beyond a limit they lie on disk."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
import torch

MOST_BYTES = 2 << 30
"""What is kept in memory; more goes into a file in ComfyUI's temporary folder, which is deleted at the end."""
STORED = torch.bfloat16
FILE = "points.bin"


@dataclass
class Points:
    """values: bf16 [points, 2, *shape], of each what went in and its velocity. prompts, sigmas: of those that were
    added. energies: |velocity|^2 of each."""

    values: torch.Tensor
    prompts: list[int] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, prompt: int, sigma: float, x: torch.Tensor, velocity: torch.Tensor) -> None:
        """Appends a point [1, *shape]. Raises ValueError for a velocity that is not finite."""
        energy = float(velocity.detach().double().square().sum())
        if not math.isfinite(energy):
            raise ValueError(
                f"the original model computes values that are not finite at sigma {sigma:.4g}: look at what it draws, "
                "and load it with compute_dtype bf16 or fp32"
            )
        place = self.values[len(self)]
        place[0].copy_(x[0])
        place[1].copy_(velocity[0])
        self.prompts.append(prompt)
        self.sigmas.append(sigma)
        self.energies.append(energy)

    def get(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (what went in, its velocity), each [1, *shape]."""
        x, velocity = self.values[number].to(device, torch.float32)
        return x.unsqueeze(0), velocity.unsqueeze(0)


@contextlib.contextmanager
def room_for(count: int, shape: Sequence[int]) -> Iterator[Points]:
    """Room for so many points of this shape; gone at the end, with its file. Raises ValueError if there is none."""
    size = (count, 2, *shape)
    numbers = math.prod(size)
    if numbers * STORED.itemsize <= MOST_BYTES:
        with torch.inference_mode(False):
            points = Points(torch.empty(size, dtype=STORED))
        yield points
        return
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bonsai-", dir=folder, ignore_cleanup_errors=True) as inside:
        file = str(Path(inside) / FILE)
        _fill(Path(file), numbers * STORED.itemsize)
        with torch.inference_mode(False):
            points = Points(torch.from_file(file, shared=True, size=numbers, dtype=STORED).view(size))
        try:
            yield points
        finally:
            points.values = torch.empty(0)  # lets go of the file, for Windows deletes none that is mapped


def _fill(path: Path, size: int) -> None:
    """Writes the file whole: a page of a mapped one that finds no room on the disk later ends the process."""
    piece = memoryview(bytes(min(size, 16 << 20)))
    try:
        with path.open("wb") as out:
            for start in range(0, size, len(piece)):
                out.write(piece[: size - start])
    except OSError as error:
        raise ValueError(
            f"the points need {size / 1e6:,.1f} MB in {path.parent.parent}, which cannot be written there "
            f"({error.strerror or error}): free some room on that disk, or ask for fewer points or a smaller latent"
        ) from error
