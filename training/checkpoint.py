"""What a training run needs to go on: states and the step, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch


class Checkpoint:
    """States of `parts` (anything with state_dict and load_state_dict) in one file."""

    def __init__(self, path: Path, **parts: object) -> None:
        self.path, self.parts = path, parts

    def load(self) -> int:
        """Puts the saved states into the parts that were saved; the step, 0 without a file."""
        if not self.path.is_file():
            return 0
        saved = torch.load(self.path, weights_only=True, map_location="cpu")
        for name, part in self.parts.items():
            if name in saved["states"]:
                part.load_state_dict(saved["states"][name])
        return saved["step"]

    def save(self, step: int) -> None:
        """Writes the states of all parts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save({"step": step, "states": {n: p.state_dict() for n, p in self.parts.items()}}, part)
        part.replace(self.path)
