"""Triton kernels compiled for a GPU that is not there, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def label(target: int | str) -> str:
    """sm_86 for 86; AMD names stay."""
    return target if isinstance(target, str) else f"sm_{target}"


def compile_kernel(kernel: Any, types: dict, constants: dict, aligned: set, target: int | str, **options: float) -> Any:
    """A Triton kernel compiled without a GPU. types: {argument: its type}; `aligned`: those divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    if isinstance(target, str):
        device = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    else:
        device = GPUTarget("cuda", target, 32)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=device, options=options)


def disassembled(compiled: Any, target: int | str) -> tuple[dict[str, int], list[str], list[list[str]]]:
    """({registers, spills, smem: count}, all instructions, those of each loop) of a compiled kernel."""
    if isinstance(target, str):
        text = compiled.asm["amdgcn"]
        facts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        listing = [line.split(";")[0].strip() for line in text.splitlines()]
        instructions, loops = _loops(listing, r"^(\.LBB\w+):", r"^s_cbranch\w*\s+(\.LBB\w+)|^s_branch\s+(\.LBB\w+)")
        registers = facts["vgpr_count"]
        spills = facts["vgpr_spill_count"] + facts["sgpr_spill_count"]
    else:
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
        listing = [
            re.sub(r"^/\*[0-9a-f]+\*/\s*", "", line.strip()).rstrip("; ")
            for line in _nvidia_tool("nvdisasm", "-c", compiled.asm["cubin"]).splitlines()
            if re.match(r"^\s*(/\*[0-9a-f]{4,}\*/|\.L_\w+:)", line)
        ]
        instructions, loops = _loops(listing, r"^(\.L_\w+):", r"\bBRA\b.*`\((\.L_\w+)\)")
        registers = max(int(r) for r in re.findall(r"REG:(\d+)", usage))
        spills = sum(opcode(text).startswith(("LDL", "STL")) for text in instructions)
    return {"registers": registers, "spills": spills, "smem": compiled.metadata.shared}, instructions, loops


def shared_memory(cubin: bytes) -> int:
    """Bytes of shared memory that the kernels of NVIDIA's machine code take, the most of one."""
    return max(int(n) for n in re.findall(r"SHARED:(\d+)", _nvidia_tool("cuobjdump", "--dump-resource-usage", cubin)))


def opcode(instruction: str) -> str:
    """The opcode without braces and the predicate before it."""
    words = instruction.lstrip("{ ").split()
    if words and words[0].startswith("@"):
        words = words[1:]
    return words[0] if words else ""


def _loops(listing: list[str], label_pattern: str, branch_pattern: str) -> tuple[list[str], list[list[str]]]:
    """Instructions, and for every backward branch those from its target to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[list[str]] = []
    for line in listing:
        found = re.match(label_pattern, line)
        if found:
            labels[found[1]] = len(instructions)
        elif line and not line.startswith((".", "//")) and not line.endswith(":"):
            instructions.append(line)
            branch = re.search(branch_pattern, line)
            start = labels.get(next(filter(None, branch.groups()))) if branch else None
            if start is not None:
                loops.append(instructions[start:])
    return instructions, loops


def _nvidia_tool(tool: str, option: str, cubin: bytes) -> str:
    """Output of a CUDA tool that Triton's wheel contains."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout
