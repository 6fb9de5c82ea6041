"""A small emulation of the PTX that the kernels decode with, for the tests that look at every byte."""

from __future__ import annotations

import torch


class Ptx:
    """Runs the few PTX instructions the kernels use, on int64 arrays that hold 32-bit registers."""

    MASK = 0xFFFFFFFF

    def __init__(self, text: str, inputs: dict[int, torch.Tensor], program: torch.Tensor | None = None) -> None:
        self.registers: dict[str, torch.Tensor] = {f"${i}": value for i, value in inputs.items()}
        self.registers["%ctaid.x"] = self.registers["%ctaid.y"] = program
        for statement in filter(None, (part.strip(" {}") for part in text.split(";"))):
            name, _, operands = statement.partition(" ")
            if name != ".reg":
                target, *sources = (part.strip() for part in operands.split(","))
                self.registers[target] = self.run(name, [self.value(source) for source in sources])

    def value(self, source: str) -> torch.Tensor:
        return self.registers[source] if source in self.registers else torch.tensor(int(source, 0))

    def run(self, name: str, v: list[torch.Tensor]) -> torch.Tensor:
        match name:
            case "mov.b32" | "mov.u32" | "mov.b64":
                return v[0]
            case "shr.u64":
                return v[0] >> v[1]
            case "cvt.u32.u64":
                return v[0] & self.MASK
            case "mul.lo.u32":
                return v[0] * v[1] & self.MASK
            case "and.b32":
                return v[0] & v[1]
            case "neg.s32":
                return -v[0] & self.MASK
            case "shl.b32":
                return v[0] << v[1] & self.MASK
            case "mad.lo.u32":
                return v[0] * v[1] + v[2] & self.MASK
            case "lop3.b32":
                terms = [
                    (v[0] if i & 4 else ~v[0]) & (v[1] if i & 2 else ~v[1]) & (v[2] if i & 1 else ~v[2])
                    for i in range(8)
                    if int(v[3]) >> i & 1
                ]
                result = torch.zeros_like(terms[0])
                for term in terms:
                    result = result | term
                return result & self.MASK
            case "prmt.b32":
                pool = [v[i // 4] >> 8 * (i % 4) & 255 for i in range(8)]
                picks = [int(v[2]) >> 4 * i & 15 for i in range(4)]
                assert max(picks) < 8, "sign replication is not emulated"
                return sum(pool[pick] << 8 * i for i, pick in enumerate(picks))
            case "mul.rn.f16x2":
                return self.lanes(torch.float16, v[0], v[1])
            case "fma.rn.bf16x2":
                assert int(v[2]) == 0x80008000  # -0.0: the sum is the product
                return self.lanes(torch.bfloat16, v[0], v[1])
        raise AssertionError(f"{name} is not emulated")

    @staticmethod
    def lanes(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products = [x.double() * y.double() for x, y in zip(as_floats(a, dtype), as_floats(b, dtype), strict=True)]
        halves = [product.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF for product in products]
        return halves[0] | halves[1] << 16


def as_floats(register: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The two 16-bit lanes of a register, low first."""
    parts = [register >> 16 * lane & 0xFFFF for lane in (0, 1)]
    return [part.where(part < 0x8000, part - 0x10000).to(torch.int16).view(dtype) for part in parts]
