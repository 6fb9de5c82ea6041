"""Drawings, captions, the judge and the rounding of the seedling's training."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from bonsai_ops.kernels import cpu_has_fast_bf16
from bonsai_ops.quantize.recover import Residual
from bonsai_ops.tools.bench import recover
from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.weights.codec import decode, spread_fields
from bonsai_ops.weights.packed_weight import pack_signs
from training import (
    badge,
    captions,
    curve,
    dataset,
    fidelity,
    figures,
    gradients,
    modes,
    node,
    other,
    speed,
    text_encoder,
    transformer,
    twin,
    vae,
)
from training.drawing import draw
from training.export import words
from training.judge import judge
from training.measure import held_out
from training.muon import orthogonal
from training.rows import Rows, read
from training.scene import JUDGED, random_scene

SIZES = [(128, 128), (192, 128), (128, 192), (256, 256)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_judge_reads_every_attribute_of_drawings(size: tuple[int, int]) -> None:
    rng = random.Random(str(size))
    for _ in range(24):
        scene = random_scene(rng, None)
        assert judge(np.asarray(draw(scene, *size))) == scene.judged(), scene


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_judge_reads_soft_drawings(size: tuple[int, int]) -> None:
    """A blur of a hundredth of the shorter side changes no answer: blossoms do not turn red leaves pink."""
    rng = random.Random(str(size))
    for _ in range(60):
        scene = random_scene(rng, None)
        soft = draw(scene, *size).filter(ImageFilter.GaussianBlur(min(size) / 128))
        assert judge(np.asarray(soft)) == scene.judged(), scene


def test_the_judge_can_say_no() -> None:
    """Grey noise is not read as what a caption asks for."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    rng = random.Random(0)
    right = [judge(noise) == random_scene(rng, None).judged() for _ in range(200)]
    assert sum(right) <= 2


def test_drawings_are_the_same_every_time() -> None:
    scene = random_scene(random.Random(3))
    assert np.array_equal(np.asarray(draw(scene, 128, 192)), np.asarray(draw(scene, 128, 192)))


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(1)
    trained = {tuple(random_scene(rng).judged().items()) for _ in range(3000)}
    tested = {tuple(scene.judged().items()) for scene, _ in held_out(64)}
    assert len(tested) > 40 and not trained & tested


def test_captions_say_what_they_claim_to_say() -> None:
    words = {
        "pot": captions.POT_WORDS,
        "foliage": captions.LEAF_WORDS,
        "background": captions.BACKGROUND_PHRASES,
        "season": captions.SEASON_PHRASES,
    }
    rng = random.Random(2)
    for _ in range(400):
        scene = random_scene(rng, None)
        text, named = captions.caption(scene, rng, omit=0.3)
        for name, table in words.items():
            if name in named:
                assert any(word in text.lower() for word in table[getattr(scene, name)]), (text, name)
    assert all(set(JUDGED) == captions.caption(random_scene(rng), rng, omit=0)[1] for _ in range(20))


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_rounded_masters_are_packed_weights(scheme: str) -> None:
    """Values of the forward pass = values of the packed form; gradients reach the master unchanged."""
    master = torch.randn(24, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    packing = transformer.Packed()
    packing.scheme = scheme
    values = packing(master)
    signs, scale = transformer.quantize(master, scheme)
    codes = (1 - signs if scheme == "ternary" else (1 - signs) / 2).flatten(1).to(torch.uint8)
    packed = pack_signs(codes, scale, transformer.GROUP, scheme)
    assert packed.scale.dtype == torch.bfloat16
    assert torch.equal(decode(packed.codec, packed.codes, 24), codes)
    assert torch.allclose(packed.dequantize(), values.detach(), atol=1e-7)
    values.sum().backward()
    assert torch.equal(master.grad, torch.ones_like(master))


def test_four_bit_words_are_mlx_words() -> None:
    """words() packs least significant first, as formats/mlx.py reads."""
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spread_fields(words(codes).view(torch.uint8), text_encoder.BITS), codes)


def test_the_untrained_vae_is_nearly_a_linear_one() -> None:
    """Least squares alone give a picture of the right colours, and latents of unit variance."""
    torch.manual_seed(0)
    rng = random.Random(4)
    pictures = np.stack([np.asarray(draw(random_scene(rng, None), 64, 64)) for _ in range(48)])
    model = vae.Autoencoder()
    model.start_linear(pictures)
    latents = vae.encode(model, pictures)
    assert latents.shape == (48, 128, 4, 4) and abs(float(latents.std()) - 1) < 0.1
    assert vae.psnr(model, pictures) > 17


def test_muon_steps_along_an_orthogonal_matrix() -> None:
    gradient = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for matrix in (gradient.flatten(1), gradient.flatten(1).T):
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_errors_count_by_what_they_change_in_the_picture() -> None:
    """A latent that moves all pixels weighs more than one that moves a single one; on average nothing changes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 128, 4, 4, generator=generator)
    values = torch.nn.functional.pixel_shuffle(latents, 2)
    pictures = torch.full((6, 64, 64, 3), 128.0)
    pictures += 20 * values[:, 0].repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(-1)  # every pixel
    pictures[:, ::8, ::8, 0] += 20 * values[:, 1]  # one value of each block
    root = transformer.importance(latents.numpy(), pictures.clamp(0, 255).byte().numpy())
    errors = []
    for channel in range(3):
        difference = torch.zeros(1, 16, 128)
        difference[..., 4 * channel : 4 * channel + 4] = 1
        errors.append(float(transformer.weighted_error(difference, root)))
    assert errors[0] > 10 * errors[1] > 10 * errors[2] * 0.9
    every = float(transformer.weighted_error(torch.randn(64, 16, 128, generator=generator), root))
    assert abs(every - 1) < 0.1


def test_badges_are_set_the_same_every_time() -> None:
    """The icon's corners are clear; the banner has its six drawings at the right."""
    drawings = [draw(random_scene(random.Random(i), None), 256, 256) for i in range(6)]
    icon = badge.icon(drawings[0]).convert("RGBA")
    assert icon.size == (400, 400) and icon.getpixel((0, 0))[3] == 0 and icon.getpixel((200, 200))[3] == 255
    banner = badge.banner(drawings)
    assert banner.size == (1260, 540) and banner.tobytes() == badge.banner(drawings).tobytes()
    shown = np.asarray(banner.convert("RGB").crop((450, 270, 720, 540)).resize((256, 256)), np.float32)
    assert np.abs(shown - np.asarray(drawings[3], np.float32)).mean() < 8


def test_products_are_in_the_fast_number_format() -> None:
    """bf16 is emulated on processors without it, where a stage of the training would never end."""
    with speed.narrow():
        found = torch.ones(2, 2) @ torch.ones(2, 2)
    assert found.dtype == (torch.bfloat16 if cpu_has_fast_bf16() else torch.float32)


def test_a_share_of_the_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the first of all of them."""
    monkeypatch.setattr(dataset, "SIZES", {(128, 128): 10})
    for share in (0.3, 1.0):
        (tmp_path / str(share)).mkdir()
        dataset.make(tmp_path / str(share), 1, share)
    few, scenes = dataset.load(tmp_path / "0.3", 128, 128)
    every, all_scenes = dataset.load(tmp_path / "1.0", 128, 128)
    assert len(few) == 3 and np.array_equal(few, every[:3]) and scenes == all_scenes[:3]


def test_every_way_has_a_name_of_its_own() -> None:
    names = [way.name for way in fidelity.ways()]
    assert len(set(names)) == len(names) > 40
    assert names[0] == "dense, rounded" and "binary, calibrated, rank 32, recovered, seed 0" in names


def test_the_tables_of_the_documents_are_filled_in(tmp_path: Path) -> None:
    """What a work folder has goes into the figures' file and its table; nothing else of the document changes."""
    shares = {"pot": 1.0, "season": 0.5, "all": 0.5}
    row = {"bits": 1.125, "velocity": 0.5, "latent": 0.25, "psnr": 20.0, "attributes": shares, "seconds": 1.0}
    docs, work = tmp_path / "docs", tmp_path / "work"
    (docs / "results").mkdir(parents=True)
    work.mkdir()
    before = (figures.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    (docs / "benchmarks.md").write_text(before, encoding="utf-8")
    report = docs / "report-to-comfyui.md"
    report.write_text((figures.DOCS / report.name).read_text(encoding="utf-8"), encoding="utf-8")
    at = [{"raises": "one of"}, {"cosine": 0.5, "error": 0.75}, {"cosine": 0.9987, "error": 1e-2}]
    right = [{"cosine": 1.0, "error": error} for error in (1.25e-7, 3e-6, 0.0)]
    seen = {
        key: {str(depth): found for depth, found in enumerate(each)} for key, each in (("stock", at), ("right", right))
    }
    (work / gradients.FILE).write_text(json.dumps({"a model": seen}), encoding="utf-8")
    trained = "binary, calibrated, rank 32, recovered, seed 0"
    (work / fidelity.FILE).write_text(json.dumps({trained: row, "binary, rounded": row}), encoding="utf-8")
    Rows(work / other.FILE).add("ternary, rounded", row)
    seen = {**row, "sampling": 60.4, "training": 599.5}
    (work / node.FILE).write_text(json.dumps({"dense": row, "binary, recovered": seen}), encoding="utf-8")
    shares = dict.fromkeys((*JUDGED, "all"), 1.0)
    far = {"text": 0.002, "latent": 0.02, "psnr": 51.25}
    drawn = {"fp32": {"attributes": shares}, "a8": {"attributes": {**shares, "pot": 0.99}, **far}}
    (work / modes.FILE).write_text(json.dumps({"128x128": drawn}), encoding="utf-8")
    figures.show(work, docs)
    after = (docs / "benchmarks.md").read_text(encoding="utf-8")
    plain = "| 1.12 | 0.500 | 0.250 | 20.0 dB | 75.0 % | 50.0 % |"
    assert f"| --- |\n| binary, rounded {plain}\n| **{trained}** {plain}\n<!-- end of fidelity -->" in after
    assert "| --- |\n| ternary, rounded | 1.12 | 0.500 | 0.250 |\n<!-- end of other -->" in after
    plain = "| 1.12 | 0.500 | 0.250 | 75.0 % | 50.0 % |"
    assert f"| --- |\n| dense {plain}  |\n| **binary, recovered** {plain} 60 s, 600 s |\n<!-- end of node -->" in after
    right = " 100.0 % |" * 5
    assert f"| --- |\n| 128x128, fp32 |  |  |  | 100.0 % |{right}\n" in after
    assert f"\n| 128x128, a8 | 0.20 % | 2.00 % | 51.2 dB | 99.0 % |{right}\n<!-- end of modes -->" in after
    outside = [re.sub(r"<!-- (\w+) -->.*?<!-- end", "", text, flags=re.DOTALL) for text in (before, after)]
    assert outside[0] == outside[1]
    assert (docs / fidelity.PICTURE).is_file() and (docs / "results" / other.FILE).is_file()
    assert (docs / other.PICTURE).is_file()
    assert "| --- |\n| a model | raises | 0.50 | 0.999 | 3.0e-6 |\n<!-- end of gradients" in report.read_text("utf-8")
    with pytest.raises(ValueError, match="found 0"):
        figures.filled(before, "nothing", "")


@pytest.mark.parametrize("page", [".md", "/ja.md", "/zh.md"])
def test_the_help_has_the_figures_of_the_stage(page: str) -> None:
    text = (PLUGIN / "web" / "docs" / f"BonsaiRightGradients{page}").read_text(encoding="utf-8")
    rows = read(figures.DOCS / "results" / gradients.FILE)
    assert len(rows) == 1 + len(gradients.KINDS)
    for row in rows.values():
        shown = (r"[^|\d]+" if cell == "raises" else f" {re.escape(cell)} " for cell in gradients.cells(row))
        assert re.search(rf"\|{'[|]'.join(shown)}\|\n", text)
        assert all(round(found["cosine"], 6) == 1 for found in row["right"].values())


def test_rows_say_what_they_were_measured_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"old": {"bits": 1}}), encoding="utf-8")
    rows = Rows(file)
    rows.add("new", {"bits": 2})
    assert read(file) == rows == Rows(file) == {"old": {"bits": 1}, "new": {"bits": 2}}
    facts = json.loads(file.read_text(encoding="utf-8"))["machine"]
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__ and facts["commit"]


def test_the_stage_runs_the_node_as_it_is_set() -> None:
    """Its figures are said to be those of the node's defaults."""
    text = (PLUGIN / "nodes" / "recover.py").read_text(encoding="utf-8")
    found = dict(re.findall(r'"(\w+)",\s+default=([\d.]+),\s+min', text))
    assert {name: float(found[name]) for name in node.PLAN} == node.PLAN
    reckoned = {"points": recover.POINTS, "steps": recover.STEPS, "batch": recover.BATCH}  # hours of a run, by bench
    assert reckoned.items() <= node.PLAN.items()


def test_residuals_stand_beside_a_layer_in_their_ranges() -> None:
    """As a weight with the residual multiplies, for those of a batch whose sigma is in its range."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 5, generator=generator), torch.randn(6, 5, generator=generator)
    low, high = (Residual(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator)) for _ in "ab")
    found = twin.beside(x, x @ weight.T, torch.tensor([0.3, 1.0]), [((0.0, 0.5), low), ((0.5, 1.0), high)])
    for number, residual in enumerate((low, high)):
        assert torch.allclose(found[number], x[number] @ residual(weight).T, atol=1e-5)


def test_the_hadamard_basis() -> None:
    """Orthonormal and its own inverse, 128 inputs at a time: products stay, and one input becomes even."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 256, generator=generator), torch.randn(5, 256, generator=generator)
    turned = fidelity.turn(weight)
    torch.testing.assert_close(fidelity.turn(turned), weight)
    torch.testing.assert_close(fidelity.turn(x) @ turned.T, x @ weight.T)
    one = torch.zeros(1, 256)
    one[0, 3] = 1
    assert fidelity.turn(one)[0].abs().tolist() == pytest.approx([128**-0.5] * 128 + [0] * 128)


def test_the_curve_shows_what_there_is(tmp_path: Path) -> None:
    rows = {way.name: {"bits": 1 + way.rank / 12, "velocity": 0.3 / (1 + way.rank)} for way in fidelity.ways()}
    few = {name: row for name, row in rows.items() if name.startswith("binary")}
    pictures = []
    for number, part in enumerate((rows, few)):
        curve.draw(tmp_path / f"{number}.png", part)
        with Image.open(tmp_path / f"{number}.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB"), np.int64))
    blues = [int((abs(picture - curve.BLUE).sum(2) < 60).sum()) for picture in pictures]
    assert blues[0] > 100 and blues[1] == 0
    curve.draw(tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()
