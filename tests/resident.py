"""How much of a file, and of what is of none, lies in this process, as Linux tells it."""

from __future__ import annotations

import re
from pathlib import Path

from bonsai_ops.weights.mapped import SMAPS


def resident(file: Path) -> int:
    """Bytes of the file that are resident here, mapped however often."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(encoding="utf-8"))
    own = [text for text in mappings if str(file) in text.splitlines()[0]]
    return sum(int(re.search(r"Rss:\s+(\d+)", text)[1]) * 1024 for text in own)


def anonymous() -> int:
    """Bytes of this process's own that are resident, of no file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
