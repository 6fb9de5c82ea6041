"""What the main loop of a compiled kernel waits for, read from its machine code.

in_flight     sm_90: groups of wgmma that may run on after a wait for one, the fewest of the loop's waits; sm_100: 1 if
              tcgen05's last product may run on when an iteration ends; nothing where warps wait for each product
barriers      barriers of the block in an iteration
distance      instructions between a load from global memory to registers and its first use, the fewest
ahead         iterations that copies from global to shared memory are ahead of their use
overwritten   registers that are written while a wgmma that reads them may run: a fault of the assembler
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .disassembly import opcode

_BARRIER = re.compile(r"BAR\.SYNC|s_barrier$|s_barrier_wait")
_LOAD = re.compile(r"LDG\.|(?:global|buffer)_load_(?!lds)")
_STORES = re.compile(r"ST|LDGSTS|RED|BRA|BAR|UTC|SYNCS|WARPGROUP|DEPBAR|MEMBAR|FENCE|NOP|R2UR|ISETP|FSETP|LDGDEPBAR")
"""Opcodes whose first register is none that they write."""
_WIDTH = {"64": 2, "128": 4, "WIDE": 2, "4": 4}


@dataclass(frozen=True)
class Loop:
    """The columns of this module; None where a loop has nothing of the kind."""

    in_flight: int | None
    barriers: int
    distance: int | None
    ahead: float | None
    overwritten: int


def look_at(loop: list[str]) -> Loop:
    """The instructions of a loop, first to last, as disassembly.py has them."""
    return Loop(
        _in_flight(loop),
        sum(_BARRIER.match(opcode(text)) is not None for text in loop),
        _distance(loop),
        _ahead(loop),
        _overwritten(loop),
    )


def _in_flight(loop: list[str]) -> int | None:
    waits = [int(found[1], 16) for text in loop if (found := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", text))]
    if waits:
        return min(waits)
    commits = [i for i, text in enumerate(loop) if opcode(text).startswith("UTCBAR")]
    looks = [i for i, text in enumerate(loop) if opcode(text).startswith("SYNCS.PHASECHK")]
    return int(commits[-1] > looks[-1]) if commits and looks else None


def _ahead(loop: list[str]) -> float | None:
    """Groups of copies that may be under way at the wait for one, in iterations."""
    groups = sum(opcode(text) == "LDGDEPBAR" for text in loop)
    waits = [int(found[1], 16) for text in loop if (found := re.search(r"\bDEPBAR\.LE SB0, (0x\w+)", text))]
    return min(waits) / groups if groups and waits else None


def _distance(loop: list[str]) -> int | None:
    found = []
    for start, text in enumerate(loop):
        if _LOAD.match(opcode(text)):
            loaded = _registers(_operands(text)[0], opcode(text))
            later = [*loop[start + 1 :], *loop[:start]]
            uses = (i for i, other in enumerate(later) if loaded & _mentioned(other))
            found.append(next(uses, len(later)))
    return min(found, default=None)


def _overwritten(loop: list[str]) -> int:
    """Counted in the second of two iterations, with what the first one left running."""
    count, running, issued = 0, [], set()
    for turn, text in ((turn, text) for turn in (0, 1) for text in loop):
        name = opcode(text)
        if name.startswith("HGMMA"):
            first = _operands(text)[1]
            issued |= _registers(first, "HGMMA.128") if re.match(r"R\d", first) else set()
            if "gsb0" in text:
                running, issued = [*running, issued], set()
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", text):
            running = running[max(0, len(running) - int(wait[1], 16)) :]
        elif turn and not _STORES.match(name) and (operands := _operands(text)):
            count += len(_registers(operands[0], name) & set().union(issued, *running))
    return count


def _operands(text: str) -> list[str]:
    """The operands after the opcode."""
    rest = text.lstrip("{ ").split(opcode(text), 1)[1]
    return [part.strip() for part in rest.split(",")]


def _registers(operand: str, name: str) -> set[int]:
    """Vector registers that an instruction of that opcode writes or reads as this operand."""
    if found := re.match(r"v\[(\d+):(\d+)\]", operand):
        return set(range(int(found[1]), int(found[2]) + 1))
    if (found := re.match(r"[Rv](\d+)", operand)) is None:
        return set()
    parts = [] if operand[0] == "v" else name.split(".")[1:]
    width = max((_WIDTH[part] for part in parts if part in _WIDTH), default=1)
    return set(range(int(found[1]), int(found[1]) + width))


def _mentioned(text: str) -> set[int]:
    """Vector registers that occur in an instruction, those of pairs of an address both."""
    found = {int(number) for number in re.findall(r"\b[Rv](\d+)", text)}
    found |= {int(number) + 1 for number in re.findall(r"\bR(\d+)(?:\.reuse)?\.64", text)}
    for first, last in re.findall(r"\bv\[(\d+):(\d+)\]", text):
        found |= set(range(int(first), int(last) + 1))
    return found
