"""Every linear layer shape of the 4B model: packed against dense, in one run, in turns.

bf16             dense weight, torch's own product: what every ratio refers to
bf16_kept        the same into memory that is kept from call to call
trit5            ours, exact, ternary compact (1.6 bits a weight)
planes           ours, exact, ternary in 2-bit planes
bit              ours, exact, 1-bit
nibble           ours, exact, affine 4-bit in groups of 64, as in the text encoder
byte             ours, exact, affine 8-bit in groups of 128, as Patch to BitLinear makes it
a8               ours, activations in int8
a8_fp8           ours, activations in e4m3 (GPU)
fp16_accumulate  ours, sums of up to 128 products in fp16 (GPU)
unpack           the whole layer unpacked at each call, as loaders of GGUF files do
fp32             dense weight in fp32, what stock ComfyUI computes with on a CPU
gemlite          gemlite's own kernel on 2-bit weights (GPU)

On a CPU ours works as while ComfyUI samples a model: on memory that is used again (kernels/reuse.py). The dense
products get theirs from torch, as in ComfyUI; bf16_kept tells what that costs them.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ... import kernels
from ...weights import codec
from ...weights.packed_weight import SCHEMES, PackedWeight, recode
from .. import synthetic
from .report import show_table
from .timer import Timer, make_timer, run_with_scratch, speed_ratio, spread, time_in_turns
from .ways import LAYER_WAYS

CHECKED_ROWS = 64
QUIET = 0.15
"""Largest spread of the dense product on a machine that is doing nothing else."""
OURS = tuple(way.name for way in LAYER_WAYS if way.ours)
RIVALS = tuple(way.name for way in LAYER_WAYS if not way.ours and way.name != "bf16")


@dataclass(frozen=True)
class Shape:
    """One kind of layer. `calls`: calls a step in which all tokens take part; `weights`: layers of that shape."""

    k: int
    n: int
    calls: int
    weights: int


SHAPES = (
    # The image and text streams of a double block have a weight each and share the tokens.
    Shape(3072, 3072, 5, 10),
    Shape(3072, 9216, 5, 10),
    Shape(3072, 18432, 5, 10),
    Shape(9216, 3072, 5, 10),
    Shape(3072, 27648, 20, 20),
    Shape(12288, 3072, 20, 20),
)
"""proj, qkv, mlp in and mlp out of the double blocks; linear1 and linear2 of the single blocks."""


@dataclass(frozen=True)
class Way:
    """One way to multiply. nbytes: of the weight. exact: the first CHECKED_ROWS rows of the result in float64."""

    calls: list[Callable[[], torch.Tensor]]
    nbytes: int
    exact: torch.Tensor


def random_weight(scheme: str, rows: int, columns: int, device: str = "cpu") -> PackedWeight:
    """Random codes of the scheme's first codec and bf16 scales around 1 / sqrt(columns), made on the device."""
    return synthetic.random_weight(SCHEMES[scheme].codecs[0], rows, columns, device)


def activations(tokens: int, columns: int, device: str) -> torch.Tensor:
    """Gaussian bf16 [tokens, columns]. Zeros would let a GPU draw less power and clock higher."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(tokens, columns, generator=generator, device=device).bfloat16()


def ours(x: torch.Tensor, weight: PackedWeight, timer: Timer, mode: str = kernels.EXACT) -> list[Callable]:
    """Calls of our product, one a copy of the weight."""
    return [lambda w=w: kernels.linear(x, w, mode=mode) for w in _copies(weight, timer)]


def dense(x: torch.Tensor, weight: torch.Tensor, timer: Timer) -> list[Callable]:
    """Calls of torch's product, one a copy of the dense weight."""
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in _copies(weight, timer)]


def _into_kept_memory(x: torch.Tensor, weight: torch.Tensor, timer: Timer) -> list[Callable]:
    """As `dense`, all calls into one result."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return [lambda w=w: torch.mm(x, w.t(), out=out) for w in _copies(weight, timer)]


def offers(x: torch.Tensor, weight: PackedWeight, mode: str) -> str | None:
    """Why `mode` is not computed for this weight here, None if it is."""
    choice = kernels.resolve(kernels.call_of(x.device, x.dtype, weight, mode))
    return None if choice.mode == mode else choice.declined[mode]


def _copies(weight: PackedWeight | torch.Tensor, timer: Timer) -> list:
    """The weight and as many copies of it as the timer wants."""

    def copy() -> PackedWeight | torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return weight.clone()
        zero = None if weight.zero is None else weight.zero.clone()
        return replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone(), zero=zero)

    return [weight, *(copy() for _ in range(timer.copies(weight.nbytes) - 1))]


def _ways(shape: Shape, tokens: int, device: str, timer: Timer) -> Iterator[tuple[str, Way | str]]:
    """(name, the way, or why it is not measured here) for every way of the module's table."""
    ternary, binary = (random_weight(scheme, shape.n, shape.k, device) for scheme in ("ternary", "binary"))
    nibble = synthetic.random_weight("nibble", shape.n, shape.k, device, group_size=synthetic.TEXT_GROUP)
    byte = synthetic.random_weight("byte", shape.n, shape.k, device)
    planes = recode(ternary, "crumb")
    x = activations(tokens, shape.k, device)
    few = x[:CHECKED_ROWS].double()
    exact = few @ ternary.dequantize(torch.float32).double().t()
    values = ternary.dequantize(torch.bfloat16)
    yield "bf16", Way(dense(x, values, timer), values.nbytes, exact)
    yield "bf16_kept", Way(_into_kept_memory(x, values, timer), values.nbytes, exact)
    yield "trit5", Way(ours(x, ternary, timer), ternary.nbytes, exact)
    yield "planes", Way(ours(x, planes, timer), planes.nbytes, exact)
    for name, weight in (("bit", binary), ("nibble", nibble), ("byte", byte)):
        truth = few @ weight.dequantize(torch.float32).double().t()
        yield name, Way(ours(x, weight, timer), weight.nbytes, truth)
    yield "a8", _in_mode("a8", x, (planes, ternary), exact, timer)
    if device != "cpu":
        yield "a8_fp8", _in_mode("a8_fp8", x, (planes, ternary), exact, timer)
        yield "fp16_accumulate", _in_mode("fp16_accumulate", x.half(), (ternary, planes), exact, timer)
    unpack = [lambda w=w: torch.nn.functional.linear(x, w.dequantize(torch.bfloat16)) for w in _copies(ternary, timer)]
    yield "unpack", Way(unpack, ternary.nbytes, exact)
    wide = values.float()
    yield "fp32", Way(dense(x.float(), wide, timer), wide.nbytes, exact)
    yield "gemlite", _gemlite(x, ternary, exact, timer)


def _in_mode(
    mode: str, x: torch.Tensor, weights: tuple[PackedWeight, ...], exact: torch.Tensor, timer: Timer
) -> Way | str:
    """A named mode on the first of the weights that it takes."""
    reasons = [offers(x, weight, mode) for weight in weights]
    for weight, reason in zip(weights, reasons, strict=True):
        if reason is None:
            return Way(ours(x, weight, timer, mode), weight.nbytes, exact)
    return str(reasons[0])


def _gemlite(x: torch.Tensor, weight: PackedWeight, exact: torch.Tensor, timer: Timer) -> Way | str:
    """gemlite's layer on the same codes."""
    if x.device.type == "cpu":
        return "needs a GPU"
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite is not installed"
    import gemlite

    rows, columns = weight.shape
    codes = 2 - codec.decode("trit5", weight.codes, rows)  # gemlite: w = (c - 1) s
    scale = weight.scale.float().reshape(-1, 1)
    layers = []
    for _ in range(timer.copies(rows * columns // 4)):
        layer = gemlite.GemLiteLinear(
            W_nbits=2,
            group_size=weight.group_size,
            in_features=columns,
            out_features=rows,
            input_dtype=gemlite.DType.BF16,
            output_dtype=gemlite.DType.BF16,
        )
        layer.pack(codes, scale.to(x.dtype), torch.ones_like(scale, dtype=x.dtype), bias=None)
        layers.append(layer)
    nbytes = sum(t.nbytes for t in layers[0].get_tensor_args() if isinstance(t, torch.Tensor))
    return Way([lambda layer=layer: layer(x) for layer in layers], nbytes, exact)


def measure(tokens: int, device: str = "cpu", rounds: int = 5, shapes: tuple[Shape, ...] = SHAPES) -> list[dict]:
    """Prints the tables and returns a row a shape.

    m, k, n; scratch_bytes: the largest of our ways; bf16_spread: how far the rounds of the dense product lie apart; and
    for each way: <way>_s median seconds a call, <way>_vs_bf16 its speed relative to the dense bf16 product,
    <way>_bytes of the weight, <way>_scratch_bytes measured at its peak without the result, <way>_error the relative
    error |y - exact| / |exact| of CHECKED_ROWS rows against float64; None where not measured.
    """
    timer = make_timer(device)
    weight = random_weight("ternary", 256, 256, device)
    choice = kernels.resolve(kernels.call_of(torch.device(device), torch.bfloat16, weight))
    print(f"linear layers, {tokens} tokens, {device}, backend {choice.backend.NAME} {choice.declined or ''}")
    print("speed relative to dense bf16 (1 = as fast, 2 = twice as fast)")
    rows = []
    for shape in shapes:
        row, absent = _row(shape, tokens, device, timer, rounds)
        names = [name for name in (*OURS, *RIVALS) if name not in absent]
        values = (row["m"], row["k"], row["n"], 1000 * row["bf16_s"], *(row[f"{name}_vs_bf16"] for name in names))
        show_table(("m", "k", "n", "bf16 ms", *names), [values], 8, headed=not rows)
        rows.append(row)
    noise = max(row["bf16_spread"] for row in rows)
    if noise > QUIET:
        print(f"this machine was busy: the same dense product varied by {100 * noise:.0f} %; measure again")
    for name, reason in absent.items():
        print(f"{name}: not measured, {reason}")
    print("all layers of a step together (the rows above, weighted by how often the model has them)")
    show_table(
        ("way", "seconds", "vs bf16", "weights MB", "most scratch MB", "relative error"),
        [(name, *_total(rows, shapes, name)) for name in ("bf16", *names)],
    )
    return rows


def _row(shape: Shape, tokens: int, device: str, timer: Timer, rounds: int) -> tuple[dict, dict[str, str]]:
    """(the row of one shape, {way: why it is not measured here})."""
    found = dict(_ways(shape, tokens, device, timer))
    ways = {name: way for name, way in found.items() if isinstance(way, Way)}
    with kernels.keeping_memory():
        seconds = time_in_turns({name: way.calls for name, way in ways.items()}, timer, rounds)
    row: dict = {"m": tokens, "k": shape.k, "n": shape.n, "scratch_bytes": 0, "bf16_spread": spread(seconds["bf16"])}
    for name in ("bf16", *OURS, *RIVALS):
        way = ways.get(name)
        row[f"{name}_s"] = statistics.median(seconds[name]) if way else None
        if name != "bf16":
            row[f"{name}_vs_bf16"] = speed_ratio(seconds[name], seconds["bf16"]) if way else None
        row[f"{name}_bytes"] = way.nbytes if way else None
        row |= dict.fromkeys((f"{name}_scratch_bytes", f"{name}_error"))
        if way is None:
            continue
        y, scratch = run_with_scratch(way.calls[0], device)
        scratch = max(scratch, 0)  # a result that is kept was not allocated now
        row[f"{name}_scratch_bytes"], row[f"{name}_error"] = scratch, relative_error(y, way)
        if name in OURS:
            row["scratch_bytes"] = max(row["scratch_bytes"], scratch)
    absent = {name: found.get(name, "needs a GPU") for name in (*OURS, *RIVALS) if name not in ways}
    return row, {name: str(reason) for name, reason in absent.items()}


def relative_error(y: torch.Tensor, way: Way) -> float:
    """|y - exact| / |exact| (Euclidean) over the first CHECKED_ROWS rows."""
    return float((y[:CHECKED_ROWS].double() - way.exact).norm() / way.exact.norm())


def _total(rows: list[dict], shapes: tuple[Shape, ...], name: str) -> tuple[float, float, float, float, float]:
    """(seconds of a step, speed relative to bf16, MB of all weights, MB of the largest scratch, largest error)."""
    pairs = list(zip(rows, shapes, strict=True))
    seconds, bf16 = (sum(row[f"{way}_s"] * shape.calls for row, shape in pairs) for way in (name, "bf16"))
    weights = sum(row[f"{name}_bytes"] * shape.weights for row, shape in pairs)
    scratch = max(row[f"{name}_scratch_bytes"] for row in rows)
    return seconds, bf16 / seconds, weights / 1e6, scratch / 1e6, max(row[f"{name}_error"] for row in rows)
