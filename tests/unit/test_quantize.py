"""The quantizer: optimal by brute force, exact on weights that have the levels, never worse for what is added to it."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools

import pytest
import torch

from bonsai_ops.host.patch.report import LayerReport, Report
from bonsai_ops.quantize import (
    LayerError,
    Recorder,
    Settings,
    Statistics,
    budget,
    fitting_group,
    lowrank,
    quantize_layer,
)
from bonsai_ops.quantize.compensate import BLOCK, compensate, output_error
from bonsai_ops.quantize.groups import best_scale, quantize_groups, to_codes, values
from bonsai_ops.weights.packed_weight import PackedWeight, narrow_exact, pack_signs

LEVELS = {"binary": (1, -1), "ternary": (1, 0, -1)}
SAMPLES = {
    "gaussian": lambda shape, g: torch.randn(shape, generator=g),
    "laplace": lambda shape, g: (
        torch.empty(shape).exponential_(generator=g) * torch.randint(0, 2, shape, generator=g).mul(2).sub(1)
    ),
    "uniform": lambda shape, g: torch.rand(shape, generator=g) - 0.5,
    "ties and zeros": lambda shape, g: torch.randint(-2, 3, shape, generator=g).float(),
    "outlier": lambda shape, g: torch.randn(shape, generator=g) * torch.tensor([50.0] + [1.0] * (shape[-1] - 1)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(columns: int, count: int = 400, seed: int = 9) -> torch.Tensor:
    """Correlated activations [count, columns] with a few large channels, as transformers have."""
    g = generator(seed)
    x = torch.randn(count, 12, generator=g) @ torch.randn(12, columns, generator=g)
    x = x + 0.5 * torch.randn(count, columns, generator=g)
    x[:, ::17] *= 6
    return x


def statistics(x: torch.Tensor, gram: bool = True) -> Statistics:
    second = x.T @ x / x.shape[0]
    return Statistics(second.diagonal().clone(), second if gram else None, x.shape[0])


def group_error(groups: torch.Tensor, scale: torch.Tensor, scheme: str, h: torch.Tensor) -> torch.Tensor:
    found = values(to_codes(groups, scale, scheme), scale, scheme)
    return (h * (groups.double() - found).square()).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", LEVELS)
@pytest.mark.parametrize("kind", SAMPLES)
def test_no_assignment_is_better(kind: str, scheme: str, weighted: bool) -> None:
    """Against every one of the 2^n or 3^n codes with its least-squares scale: exact scales, then bf16 ones."""
    n = 7
    groups = SAMPLES[kind]((40, n), generator()).float()
    h = torch.rand(n, generator=generator(1), dtype=torch.float64) if weighted else torch.ones(n, dtype=torch.float64)
    if weighted:
        h[2] = 0
    every = torch.tensor(list(itertools.product(LEVELS[scheme], repeat=n)), dtype=torch.float64)
    mass = (h * every.square()).sum(-1)
    product = (groups.double() * h) @ every.T
    free = torch.where(mass > 0, product / mass.clamp_min(1e-300), 0.0).clamp_min(0)
    whole = (h * groups.double().square()).sum(-1, keepdim=True)
    importance = h if weighted else None
    for dtype in (torch.float64, torch.bfloat16):
        scale = free.to(dtype).double()
        errors = whole - 2 * scale * product + scale.square() * mass
        found = group_error(groups, best_scale(groups, scheme, importance, dtype), scheme, h)
        assert torch.all(found <= errors.amin(-1) + 1e-9 * whole.squeeze(-1))


@pytest.mark.parametrize("scheme", LEVELS)
def test_no_bf16_scale_is_better(scheme: str) -> None:
    """Every positive bf16 number as the scale, each with its best codes."""
    groups = torch.randn(6, 32, generator=generator())
    every = torch.arange(1, 0x7F00, dtype=torch.int16).view(torch.bfloat16).double()
    every = every[(every > 1e-3) & (every < 1e2)]
    ones = torch.ones(32, dtype=torch.float64)
    found = group_error(groups, best_scale(groups, scheme), scheme, ones)
    for i in range(groups.shape[0]):
        rivals = group_error(groups[i].expand(len(every), -1), every, scheme, ones)
        assert found[i] <= rivals.amin() * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("scheme", LEVELS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_has_the_levels_comes_back(scheme: str, group_size: int, dtype: torch.dtype, calibrated: bool) -> None:
    """Codes, scales and the dtype of the scales, to the bit; groups of zeros and of one level among them."""
    g = generator(group_size)
    codes = torch.randint(0, len(LEVELS[scheme]), (24, 512), generator=g, dtype=torch.uint8)
    codes[3] = 0
    scale = (torch.rand(24, 512 // group_size, generator=g) * 0.1 + 1e-3).to(dtype)
    if scheme == "ternary":
        codes[5], scale[5] = 1, 0
    packed = pack_signs(codes, scale.float(), group_size, scheme)
    known = statistics(inputs(512)) if calibrated else None
    again = quantize_layer(packed.dequantize(), Settings(scheme, group_size, rank=4), known)
    assert again.error.relative == 0 and again.weight.up is None
    assert torch.equal(again.weight.codes, packed.codes)
    assert torch.equal(again.weight.scale, packed.scale) and again.weight.scale.dtype == packed.scale.dtype
    if dtype != torch.float32:
        assert torch.equal(
            quantize_layer(packed.dequantize(dtype), Settings(scheme, group_size)).weight.codes, packed.codes
        )


@pytest.mark.parametrize("scheme", LEVELS)
@pytest.mark.parametrize("kind", SAMPLES)
def test_quantizing_again_changes_nothing(kind: str, scheme: str) -> None:
    weight = SAMPLES[kind]((16, 256), generator()).float()
    once = quantize_layer(weight, Settings(scheme, 64)).weight
    twice = quantize_layer(once.dequantize(), Settings(scheme, 64)).weight
    assert torch.equal(once.dequantize(), twice.dequantize()) and torch.equal(once.scale, twice.scale)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_better_than_absmean(kind: str, group_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The margin over BitNet b1.58's rule, s = mean |w| (arXiv 2402.17764), with the same codec and scale dtype."""
    weight = SAMPLES[kind]((256, 2048), generator())
    groups = weight.view(256, -1, group_size)
    ours = quantize_layer(weight, Settings("ternary", group_size)).error
    scale = groups.abs().double().mean(-1).bfloat16().double()
    rival = (groups - values(to_codes(groups, scale, "ternary"), scale, "ternary")).norm() / groups.norm()
    with capsys.disabled():
        print(
            f"\n  ternary, {kind}, group {group_size}: relative error {ours.relative:.4f}, absmean rounding "
            f"{rival:.4f} ({100 * (1 - ours.relative / rival):.1f} % less, SQNR {ours.sqnr:.2f} dB)"
        )
    assert ours.relative < rival * 0.95


def test_zero_and_invalid_weights() -> None:
    for scheme in LEVELS:
        zero = quantize_layer(torch.zeros(8, 64), Settings(scheme, 64))
        assert zero.error.relative == 0 and torch.equal(zero.weight.dequantize(), torch.zeros(8, 64))
    weight = torch.randn(8, 64, generator=generator())
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize_layer(weight, Settings())
    with pytest.raises(ValueError, match="no multiple of 32"):
        quantize_layer(torch.zeros(8, 40), Settings())
    with pytest.raises(ValueError, match="do not fit 64 columns"):
        quantize_layer(torch.zeros(8, 64), Settings(), Statistics(torch.ones(32)))
    for wrong in ({"recipe": "int8"}, {"group_size": 100}, {"rank": -1}):
        with pytest.raises(ValueError):
            Settings(**wrong)
    assert [fitting_group(k, 128) for k in (256, 192, 96, 48)] == [128, 64, 32, None]


def test_recording_layers() -> None:
    """The mean square of each input, and their second moment while there is room for it."""
    small, large, idle = (torch.nn.Linear(columns, 8) for columns in (32, 64, 32))
    recorder = Recorder("full", gram_bytes=4 * 32**2)
    x, wide = inputs(32).view(4, 100, 32), inputs(64)
    with recorder.recording([("small", small), ("large", large), ("idle", idle)]):
        for part in x:
            small(part)
        large(wide)
    small(x)  # not recorded any more
    found = recorder.result()
    assert set(found) == {"small", "large"} and found["small"].count == 400
    flat = x.flatten(0, -2)
    torch.testing.assert_close(found["small"].gram, flat.T @ flat / 400)
    torch.testing.assert_close(found["small"].power, flat.square().mean(0))
    torch.testing.assert_close(found["large"].power, wide.square().mean(0))
    assert found["large"].gram is None  # no room was left for it
    with pytest.raises(ValueError, match="detail 'best' is unknown, expected power or full"):
        Recorder("best")
    with pytest.raises(ValueError, match="nothing was recorded"):
        Recorder().result()


@pytest.mark.parametrize("scheme", LEVELS)
def test_calibration_makes_the_output_better(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, weighted by input power, compensated with the second moment: each row no worse than before."""
    weight, x = torch.randn(96, 256, generator=generator()), inputs(256)
    truth = x @ weight.T
    errors, rows = {}, {}
    for name, known in {"plain": None, "power": statistics(x, gram=False), "gram": statistics(x)}.items():
        found = quantize_layer(weight, Settings(scheme, 64), known)
        difference = x @ found.weight.dequantize().T - truth
        errors[name] = float(difference.norm() / truth.norm())
        rows[name] = difference.norm(dim=0)
        if name == "gram":
            assert found.error.output == pytest.approx(errors[name], rel=1e-3)
    with capsys.disabled():
        print(f"\n  {scheme}, output error: " + ", ".join(f"{n} {e:.4f}" for n, e in errors.items()))
    assert errors["gram"] < errors["power"] < errors["plain"]
    assert torch.all(rows["gram"] <= rows["plain"] * (1 + 1e-4))


def test_output_errors_of_several_blocks_of_columns() -> None:
    x = torch.randn(40, 2 * BLOCK + 64, generator=generator())
    difference = torch.randn(8, x.shape[1], generator=generator())
    truth = (difference.double() @ x.double().T).square().sum(-1)
    torch.testing.assert_close(output_error(difference, x.T @ x), truth, rtol=1e-5, atol=0)


def test_compensation_with_dead_and_dependent_inputs() -> None:
    """A singular second moment: columns never used, columns that are copies of others."""
    x = inputs(128, count=20)
    x[:, 7] = 0
    x[:, 9] = x[:, 8]
    weight = torch.randn(16, 128, generator=generator())
    gram = x.T @ x
    codes, scale = compensate(weight, gram, "ternary", 32)
    plain_codes, plain_scale = quantize_groups(weight, "ternary", 32)
    found, plain = (
        float(output_error(weight - PackedWeight.dequantize(pack_signs(c, s, 32, "ternary")), gram).sum())
        for c, s in ((codes, scale), (plain_codes, plain_scale))
    )
    assert found < plain


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_a_branch_makes_it_better(scheme: str, calibrated: bool) -> None:
    g = generator()
    weight = torch.randn(160, 256, generator=g) + torch.randn(160, 3, generator=g) @ torch.randn(3, 256, generator=g)
    known = statistics(inputs(256)) if calibrated else None
    errors = [quantize_layer(weight, Settings(scheme, 64, rank), known) for rank in (0, 4, 16)]
    assert errors[0].squared > errors[1].squared > errors[2].squared
    assert errors[1].weight.rank == 4 and errors[1].weight.up.dtype == torch.bfloat16
    assert errors[2].weight.nbytes == errors[0].weight.nbytes + 2 * 16 * (160 + 256)


def test_deterministic_and_wide() -> None:
    """The randomized decomposition of large matrices starts from a fixed seed and leaves torch's generator alone."""
    weight = torch.randn(520, 544, generator=generator())
    state = torch.get_rng_state()
    first, second = (quantize_layer(weight, Settings("ternary", 32, rank=8, rounds=1)).weight for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.up, second.up)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_search_that_begins_near_is_as_good() -> None:
    """Two rounds from the directions of a matrix much like it leave no more over than four from random ones."""
    g = generator()
    matrix, size = torch.randn(520, 544, generator=g), torch.linspace(1.5, 0.5, 544)
    _, near = lowrank.fit(matrix * size, 8)
    matrix = (matrix + 0.3 * torch.randn(matrix.shape, generator=g)) * size
    found = [lowrank.fit(matrix, 8, near=start) for start in (near, None)]
    errors = [float((matrix - up.float() @ down.float()).norm()) for up, down in found]
    assert errors[0] < errors[1]


def test_four_and_eight_bits() -> None:
    """Even steps over the range of the group. Its ends may lie outside by what bf16 cuts off the tables."""
    weight = torch.randn(64, 256, generator=generator()) + 0.3
    eight, four, three = (quantize_layer(weight, Settings(s, 64)) for s in ("8bit", "4bit", "ternary"))
    assert eight.error.relative < 0.006 < 0.06 < four.error.relative < 0.09 < 0.4 < three.error.relative
    assert (eight.weight.codec, four.weight.codec) == ("byte", "nibble")
    for found in (eight, four):
        groups = (weight - found.weight.dequantize()).view(64, -1, 64).abs()
        assert torch.all(groups.median(-1).values <= found.weight.scale.float() / 2)
        assert torch.all(groups.amax(-1) <= 1.5 * found.weight.scale.float())
        assert narrow_exact(found.weight.scale).dtype == narrow_exact(found.weight.zero).dtype == torch.bfloat16
    for scheme in ("4bit", "8bit"):
        assert quantize_layer(torch.full((8, 64), 0.5), Settings(scheme, 64)).error.relative == 0
        with pytest.raises(ValueError, match="not finite"):
            quantize_layer(torch.full((8, 64), torch.inf), Settings(scheme, 64))


@pytest.mark.parametrize("scheme", ["4bit", "8bit"])
def test_even_steps_with_branch_and_calibration(scheme: str) -> None:
    """A branch lowers the error of these schemes too; known inputs change what is measured, not the weight."""
    weight = torch.randn(96, 128, generator=generator()) + torch.randn(96, 1, generator=generator(1)).mul(9)
    plain, branch = (quantize_layer(weight, Settings(scheme, 64, rank)) for rank in (0, 4))
    assert branch.squared < plain.squared and branch.weight.rank == 4
    known = quantize_layer(weight, Settings(scheme, 64), statistics(inputs(128)))
    assert torch.equal(known.weight.codes, plain.weight.codes) and 0 < known.error.output < 0.1


def on_the_hull(options: list[budget.Option]) -> list[budget.Option]:
    """Those with less error than any mixture of two others, one smaller or as large and one larger, has at their size.

    A mixture is a point on the straight line between two options.
    """
    size, error = (torch.tensor([getattr(o, n) for o in options], dtype=torch.float64) for n in ("nbytes", "error"))
    found = []
    for o in options:
        dominated = bool(((size <= o.nbytes) & (error <= o.error) & ((size < o.nbytes) | (error < o.error))).any())
        small, large = size < o.nbytes, size > o.nbytes
        share = (o.nbytes - size[small, None]) / (size[None, large] - size[small, None])
        mixed = error[small, None] * (1 - share) + error[None, large] * share
        if not dominated and not bool((mixed <= o.error).any()):
            found.append(o)
    return found


def test_budget_against_every_choice() -> None:
    """Of all 3^5 choices those on the convex hull of error over size are found, at exactly their size."""
    g = generator()
    layers = {
        f"layer{i}": [
            budget.Option("small", 10 + i, float(torch.rand((), generator=g)) + 1),
            budget.Option("middle", 30 + i, float(torch.rand((), generator=g)) * 0.8),
            budget.Option("large", 90 + i, 0.0),
        ]
        for i in range(5)
    }
    every = [
        budget.Option("", sum(o.nbytes for o in chosen), sum(o.error for o in chosen))
        for chosen in itertools.product(*layers.values())
    ]
    hull = on_the_hull(every)
    assert len(hull) > 5
    for best in hull:
        found = budget.choose(layers, best.nbytes).values()
        assert sum(o.nbytes for o in found) <= best.nbytes
        assert sum(o.error for o in found) == pytest.approx(best.error, abs=1e-12)
    assert {o.name for o in budget.choose(layers, 0).values()} == {"small"}
    assert {o.name for o in budget.choose(layers, 10**6).values()} == {"large"}


def test_budget_spends_where_it_helps() -> None:
    """The sensitive layer gets the bits; a dearer form that gains nothing is never taken."""
    layers = {
        "calm": [budget.Option("ternary", 10, 1.0), budget.Option("16bit", 100, 0.0)],
        "sensitive": [budget.Option("ternary", 10, 9.0), budget.Option("16bit", 100, 0.0)],
        "exact": [budget.Option("ternary", 10, 0.0), budget.Option("16bit", 100, 0.0)],
    }
    found = {layer: option.name for layer, option in budget.choose(layers, 120).items()}
    assert found == {"calm": "ternary", "sensitive": "16bit", "exact": "ternary"}


def test_report() -> None:
    weight = torch.randn(32, 64, generator=generator())
    made = quantize_layer(weight, Settings("ternary", 32, rank=2))
    layers = [
        LayerReport("a", "ternary", (32, 64), made.weight.nbytes, made.error, rank=2),
        LayerReport("b", "ternary", (32, 64), made.weight.nbytes, LayerError(0.0)),
        LayerReport("c", "kept", (8, 64), 1024, reason="excluded by img_in*"),
    ]
    report = Report("Flux, ternary", layers, 4096, 3, 1.5)
    text = report.to_text()
    assert "2 linear layers packed" in text and "c  kept: excluded by img_in*" in text and "3 convolutions" in text
    assert report.nbytes == 2 * made.weight.nbytes + 1024 + 4096
    assert report.total("relative") == pytest.approx(made.error.relative / 2**0.5) and report.total("output") is None
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [line["layer"] for line in lines] == ["a", "b", "c"] and lines[1]["sqnr_db"] == "inf"
    assert int(lines[0]["bytes"]) == made.weight.nbytes and float(lines[0]["bits"]) == pytest.approx(
        layers[0].bits, 1e-4
    )
    picture = report.draw()
    known = [dataclasses.replace(layers[0], error=LayerError(0.5, 0.7)), *layers[1:]]
    measured = dataclasses.replace(report, layers=known, inputs="inputs of this sampling")
    assert measured.total("output") == pytest.approx(0.7)  # of the layers where it is known
    assert "outputs, inputs of this sampling: 0.7000" in measured.to_text() and (measured.draw() != picture).any()
    assert picture.shape[1:] == (640, 3) and 0 <= picture.min() < picture.max() <= 1
    assert Report("empty", [], 0, 0, 0.0).draw().shape == picture.shape


def test_a_recorder_needs_no_comfyui() -> None:
    """Power and second moment of what goes into the layers that it is given; training uses it too."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
    recorder, seen = Recorder("full", gram_bytes=4 * 32**2), []
    with recorder.recording([("first", first), ("second", second)]):
        for _ in range(3):
            x = torch.randn(2, 5, 32, generator=generator)
            seen.append(x.flatten(0, 1).double())
            second(first(x))
    first(torch.full((4, 32), 1e6))
    x, found = torch.cat(seen), recorder.result()
    assert found.keys() == {"first", "second"} and found["first"].count == found["second"].count == 30
    torch.testing.assert_close(found["first"].gram.double(), x.T @ x / 30, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["first"].power.double(), x.square().mean(0), rtol=1e-5, atol=1e-6)
    assert found["second"].gram is None, "gram_bytes was used up"


def test_a_recorder_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="'most' is unknown, expected power or full"):
        Recorder("most")
    with pytest.raises(ValueError, match="no linear layer of the model was called"):
        Recorder().result()
