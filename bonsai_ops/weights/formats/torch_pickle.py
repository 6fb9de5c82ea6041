"""The pickle of a torch file, followed step by step before torch runs it: what it makes, how large, of what.

torch.load(weights_only=True) calls nothing that harms, yet what it allows can take all memory or never end: bytes of
any size, tables that hold one another and so double at each level, tuples nested as keys of tables (a hash of 2^40
steps), slow codecs, views on no memory. torch.save writes of tensors and plain values no more than this:

    opcodes    those of HANDLERS, of protocol 2
    names      OrderedDict(), torch.Size, the dtypes, a storage class a dtype, _rebuild_tensor_v2, _rebuild_parameter
    storages   ("storage", class, key, device, elements) with just the bytes that the archive's member has
    tables     keys that are texts or whole numbers; each stands in one place

Nothing else is followed, so nothing else is run. What tensors are of their storages is seen when they are there.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MAX_STEPS = 300_000
"""Opcodes; a text encoder of HQQ has 0.2 million."""
MAX_SIZE = 2_000_000
"""Values, counted in every place where they stand."""
MAX_DEPTH = 8
MAX_TEXT = 4096
"""Characters of a text."""
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
"""{class of torch: dtype of a storage's elements}."""
DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
TENSOR, PARAMETER, TABLE, SIZE = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "torch.Size",
)
CALLED = (TENSOR, PARAMETER, TABLE, SIZE)


class ForeignNameError(ValueError):
    """A pickle that names something which is no part of tensors and plain containers."""


@dataclass(slots=True)
class _Thing:
    """What the pickle has made: its kind, how many values are in it, how deep, and what of it must be known."""

    kind: str
    size: int = 1
    depth: int = 0
    value: Any = None

    def take(self, others: list[_Thing]) -> None:
        """Counts what was put into it. Raises ValueError where that is too much."""
        self.size += sum(other.size for other in others)
        self.depth = max([self.depth, *(other.depth + 1 for other in others)])
        if self.size > MAX_SIZE or self.depth > MAX_DEPTH:
            raise ValueError("its tables are nested too deeply or are too large")


_MARK = _Thing("mark")
_PLAIN = _Thing("plain")


class _Machine:
    """The stack and the memory of an unpickler that makes nothing."""

    def __init__(self, storages: Mapping[str, int]) -> None:
        self.stack: list[_Thing] = []
        self.memory: dict[int, _Thing] = {}
        self.storages = storages

    def pop(self, kind: str = "") -> _Thing:
        thing = self.stack.pop()
        if thing is _MARK or (kind and thing.kind != kind):
            raise ValueError(f"a {kind or 'value'} is missing")
        return thing

    def to_mark(self) -> list[_Thing]:
        found = []
        while (thing := self.stack.pop()) is not _MARK:
            found.append(thing)
        return found[::-1]

    def top(self, kind: str) -> _Thing:
        if self.stack[-1].kind != kind:
            raise ValueError(f"a {kind} is missing")
        return self.stack[-1]

    def push(self, kind: str, value: Any = None, inside: list[_Thing] | None = None) -> None:
        thing = _Thing(kind, value=value)
        if inside:
            thing.take(inside)
        self.stack.append(thing)

    def tuple_of(self, items: list[_Thing]) -> None:
        self.push("tuple", items, items)

    def set_items(self, items: list[_Thing]) -> None:
        if len(items) % 2 or any(key.kind not in ("text", "number") for key in items[::2]):
            raise ValueError("a table has a key that is no text")
        self.top("table").take(items)

    def keep(self, slot: int) -> None:
        self.memory[slot] = self.stack[-1]

    def recall(self, slot: int) -> None:
        thing = self.memory[slot]
        if thing.kind in ("table", "list"):
            raise ValueError("a table stands in two places")
        self.stack.append(thing)

    def name(self, found: str) -> None:
        found = found.replace(" ", ".")
        module, _, leaf = found.rpartition(".")
        if found not in CALLED and found not in DTYPES and not (module == "torch" and leaf in STORAGES):
            raise ForeignNameError(found)
        self.push("name", found)

    def storage(self) -> None:
        kind, cls, key, device, count = self.pop("tuple").value
        leaf = cls.value.rpartition(".")[2] if cls.kind == "name" else ""
        if leaf not in STORAGES or (kind.kind, kind.value) != ("text", "storage") or device.kind != "text":
            raise ValueError("a tensor has no storage")
        if key.kind != "text" or count.kind != "number" or key.value not in self.storages:
            raise ValueError("a tensor has no storage")
        if count.value * STORAGES[leaf].itemsize != self.storages[key.value]:
            raise ValueError(
                f"storage {key.value[:20]} is said to have {count.value} elements, the file has "
                f"{self.storages[key.value]} bytes of it"
            )
        self.push("storage")

    def call(self) -> None:
        arguments, function = self.pop("tuple").value, self.pop("name").value
        kinds = [argument.kind for argument in arguments]
        if function == TABLE and not kinds:
            self.push("table")
        elif function == SIZE and kinds == ["tuple"] and _are_sizes(arguments[0]):
            self.push("plain", None, arguments)
        elif function == TENSOR and kinds[:4] == ["storage", "number", "tuple", "tuple"] and len(kinds) in (6, 7):
            if not _are_sizes(arguments[2]) or not _are_sizes(arguments[3]) or not _is_empty(arguments[5]):
                raise ValueError("a tensor has no sizes")
            self.push("tensor")
        elif function == PARAMETER and kinds == ["tensor", "plain", "table"] and _is_empty(arguments[2]):
            self.push("tensor")
        else:
            raise ValueError(f"{function} is called with other things than torch saves")

    def build(self) -> None:
        """The attributes of a module's table of tensors: {"_metadata": versions}."""
        state = self.pop("table")
        self.top("table").take([state])


def _are_sizes(things: _Thing) -> bool:
    return all(thing.kind == "number" for thing in things.value)


def _is_empty(table: _Thing) -> bool:
    return table.kind == "plain" or (table.kind == "table" and table.size == 1)


def _number(machine: _Machine, value: int) -> None:
    if abs(value) >= 1 << 63:
        raise ValueError("a number is too large")
    machine.push("number", value)


def _text(machine: _Machine, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise ValueError(f"a text has {len(value)} characters")
    machine.push("text", value)


def _append(machine: _Machine, items: list[_Thing]) -> None:
    machine.top("list").take(items)


HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.stack.append(_MARK),
    "NONE": lambda m, _: m.stack.append(_PLAIN),
    "NEWTRUE": lambda m, _: m.stack.append(_PLAIN),
    "NEWFALSE": lambda m, _: m.stack.append(_PLAIN),
    "BINFLOAT": lambda m, _: m.stack.append(_PLAIN),
    "BININT": _number,
    "BININT1": _number,
    "BININT2": _number,
    "LONG1": _number,
    "BINUNICODE": _text,
    "EMPTY_DICT": lambda m, _: m.push("table"),
    "EMPTY_LIST": lambda m, _: m.push("list"),
    "EMPTY_TUPLE": lambda m, _: m.tuple_of([]),
    "TUPLE": lambda m, _: m.tuple_of(m.to_mark()),
    "TUPLE1": lambda m, _: m.tuple_of([m.pop()]),
    "TUPLE2": lambda m, _: m.tuple_of([m.pop(), m.pop()][::-1]),
    "TUPLE3": lambda m, _: m.tuple_of([m.pop(), m.pop(), m.pop()][::-1]),
    "APPEND": lambda m, _: _append(m, [m.pop()]),
    "APPENDS": lambda m, _: _append(m, m.to_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "BINPUT": lambda m, slot: m.keep(slot),
    "LONG_BINPUT": lambda m, slot: m.keep(slot),
    "BINGET": lambda m, slot: m.recall(slot),
    "LONG_BINGET": lambda m, slot: m.recall(slot),
    "GLOBAL": lambda m, name: m.name(name),
    "BINPERSID": lambda m, _: m.storage(),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
}
"""{opcode: what it does}; others are refused."""


def require_plain(raw: bytes, storages: Mapping[str, int]) -> None:
    """Raises ValueError unless a pickle makes tensors and plain values only, ForeignNameError where it names others.

    storages: {key: bytes} of the archive's storages.
    """
    machine = _Machine(storages)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(raw))):
            handler = HANDLERS.get(opcode.name)
            if handler is None or step > MAX_STEPS:
                raise ValueError(f"step {step} of its pickle is {opcode.name}, which torch does not save")
            handler(machine, argument)
    except (IndexError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    if len(machine.stack) != 1:
        raise ValueError("its pickle is damaged")
