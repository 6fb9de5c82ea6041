"""The benchmarks that start a ComfyUI of their own, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bonsai_ops import kernels
from bonsai_ops.tools import synthetic
from bonsai_ops.tools.bench import errors, overhead, picture, profile, quantize, recover, session, step, train
from bonsai_ops.tools.bench.inside.step import STEPS
from bonsai_ops.tools.bench.ways import STEP_WAYS, named
from bonsai_ops.tools.environment import PLUGIN, inherited_environment

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that --work names, with tiny parts in place of the full-size ones."""
    folder = tmp_path_factory.mktemp("work")
    synthetic.write_mlx(folder / "ternary" / "mlx.safetensors", "ternary", synthetic.TINY)
    synthetic.write_text_encoder(folder / "text_encoder-mlx-4bit", synthetic.TINY_TEXT)
    synthetic.write_vae(folder / "vae", synthetic.TINY_VAE_WIDTHS)
    synthetic.write_dense(folder / "dense.safetensors", synthetic.TINY)
    return folder


def test_a_picture_part_by_part(comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = picture.measure(list(picture.ours_of(picture.Ours(comfyui_path, work), 64, ["exact"], ())))
    ours = figures["ours"]
    assert len(ours["step_s"]) == picture.STEPS
    assert sum(ours["step_s"]) <= ours["steps_s"]
    assert ours["total_s"] == pytest.approx(ours["text_encoder_s"] + ours["steps_s"] + ours["vae_s"])
    assert ours["whole_s"] > ours["total_s"] + ours["load_s"] + ours["png_s"] and ours["mode"] == "exact"
    parts = sum(ours[f"{part}_processor_s"] for part in ("load", "text_encoder", "steps", "vae", "png"))
    assert 0 < parts < ours["processor_s"]
    assert ours["peak_bytes"] > 1e8
    assert (ours["joules"] is None) == bool(ours["no_joules"])
    assert "VAE decode" in capsys.readouterr().out


def test_errors_beside_fp32_throughout(
    comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every mode beside one more picture, whose own computing leaves nothing between it and itself."""
    programs = list(picture.ours_of(picture.Ours(comfyui_path, work), 64, ["exact", "a8"], (), tmp_path))
    figures = picture.measure(programs)
    found = errors.measure(tmp_path, list(figures))
    assert list(found) == ["ours", "ours_a8"] and "ours_fp32" in figures
    narrow = kernels.cpu_has_fast_bf16()
    assert (found["ours"]["text"] > 1e-4) == (found["ours"]["velocity"] > 1e-4) == narrow
    assert found["ours"]["text"] == found["ours_a8"]["text"] < 0.03
    assert found["ours"]["velocity"] < found["ours_a8"]["velocity"] < 0.1 and 0 < found["ours_a8"]["latent"] < 0.1
    assert "velocity of the first step" in capsys.readouterr().out


def test_layers_that_unpack_at_each_call_draw_the_same(comfyui_path: Path, work: Path, tmp_path: Path) -> None:
    """A rival of ours, with ComfyUI's own VAE: only published sizes are known to it."""
    folder = tmp_path / "work"
    synthetic.write_vae(folder / "vae")
    ours = picture.Ours(comfyui_path, folder, steps=2)
    files = picture.files_of(picture.Ours(comfyui_path, work), None)
    found = {}
    for kind in ("bonsai", "unpack"):
        states = tmp_path / f"{kind}.safetensors"
        found[kind] = ours.row(files, (64, 64), kind=kind, keep=states), load_file(states)
    assert len(found["unpack"][0]["step_s"]) == 2
    assert (found["bonsai"][0]["backend"], found["unpack"][0]["backend"]) == ("cpu", "eager")
    latents = [states["latent"] for _, states in found.values()]
    assert float((latents[0] - latents[1]).norm() / latents[0].norm()) < 0.03


def test_a_step_in_turns(
    comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "TURNS", 2)
    figures = step.measure(comfyui_path, work, 64)
    measured = [way for way in STEP_WAYS if way.mode == "exact"]
    assert [f"{way.name}_s" for way in measured] == [key for key in figures if key.endswith("_s")]
    for way in measured:
        name = way.name
        assert len(figures[f"{name}_seconds"]) == STEPS * (1 if name == "stock" else step.TURNS)
        assert min(figures[f"{name}_seconds"]) <= figures[f"{name}_s"] <= max(figures[f"{name}_seconds"])
        if way.shares:
            assert figures[f"{name}_peak_rss"] is None
        else:
            assert figures[f"{name}_peak_rss"] > 1e8
    assert figures["ours_bytes"] < 0.5 * figures["dense_bf16_bytes"]
    assert named(STEP_WAYS, "ours").text in capsys.readouterr().out


def test_what_a_lora_costs(comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = step.measure_lora(comfyui_path, work, 64, 4)
    for way in ("ours", "dense_bf16"):
        assert figures[f"{way}_cost"] == pytest.approx(figures[f"{way}_lora_s"] / figures[f"{way}_s"])
    assert "rank 4 LoRA" in capsys.readouterr().out


def test_training_and_why_not(comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both models in turn; a size that nothing holds has a row that says so, without a model loaded."""
    rows = train.measure(comfyui_path, work, (64,), 4)
    assert [row["way"] for row in rows] == list(train.WAYS)
    for row in rows:
        assert row["why_not"] is None and row["seconds"] > 0 and row["step_s"] > 0
        assert row["peak"] > 1e8 and row["sampling_peak"] > 1e8
    assert rows[0]["trained"] == rows[1]["trained"] > 1000 and rows[0]["bytes"] < 0.5 * rows[1]["bytes"]
    (large,) = train.measure(comfyui_path, work, (16384,), 4, ways=("ours",))
    assert "GB are free" in large["why_not"] and large["seconds"] is None
    shown = capsys.readouterr().out
    assert shown.count("not trained") == 1 and "of sampling" in shown


def test_a_step_taken_apart(comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = profile.measure(comfyui_path, work, 64)
    by_kind = {row["kind"]: row for row in figures["rows"]}
    assert by_kind["packed linear"]["cause"] == "plugin"
    assert by_kind["packed linear"]["calls"] == 4 * 2 + 2 * 2  # linear layers of one double and two single blocks
    assert {"attention", "norm", "RoPE", "SwiGLU", "modulation"} <= set(by_kind)
    assert {by_kind[kind]["cause"] for kind in ("SwiGLU", "modulation")} == {"ComfyUI"}
    assert sum(row["share"] for row in figures["rows"]) <= 1
    assert "packed linear" in capsys.readouterr().out


def test_what_a_layer_costs_beside_its_product(comfyui_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["way"]: row for row in overhead.measure(comfyui_path, calls=20, turns=3)}
    assert list(rows) == [name for name, *_ in overhead.ROWS]
    assert all(row["us"] > 0 for row in rows.values())
    layer, result = rows["layer"], rows["result"]
    assert (
        layer["us_beside_product"] == pytest.approx(layer["us"] - result["us"]) and result["us_beside_product"] is None
    )
    assert "packed layer" in capsys.readouterr().out


def test_quantizing(comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"ternary": {}, "mix": {"target_bytes": 7_500_000}}
    plain, mix = quantize.measure(comfyui_path, work, ways=ways)
    assert (plain["way"], mix["way"]) == ("ternary", "mix") and plain["layers"] == 4 * 2 + 2 * 2
    assert 1.6 < plain["bits"] < 1.8 < mix["bits"] and mix["bytes"] <= 7_500_000
    assert 0.4 < plain["relative_error"] < 0.5 and mix["relative_error"] < plain["relative_error"]
    assert plain["seconds"] > 0 and plain["peak_bytes"] > 1e8 and plain["loaded_peak_bytes"] > 1e8
    assert capsys.readouterr().out.count("minutes") == 1
    with pytest.raises(SystemExit, match="expected some of ternary, rank32, mix"):
        quantize.measure(comfyui_path, work, ["binary"])


def test_recovering(comfyui_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = recover.measure(comfyui_path, work, [64], rank=4)
    assert row["size"] == 64 and all(row[name] > 0 for name in ("sampled_s", "trained_s", "looked_s"))
    assert 0 < row["after"] <= row["before"] and row["residual_bytes"] > 0 and row["peak"] > 1e8
    whole = 320 * row["sampled_s"] + 1600 * row["trained_s"] + 440 * row["looked_s"]
    assert row["hours"] == pytest.approx(whole / 3600)
    assert capsys.readouterr().out.count("s trained") == 1


def test_a_child_on_a_gpu_begins_as_main_py(comfyui_path: Path, tmp_path: Path) -> None:
    """Before torch: comfy-aimdo, which takes over the driver's functions, and the allocator. It needs no GPU."""
    code = (
        "import json, os, sys; from pathlib import Path; from bonsai_ops.tools.bench.inside import comfyui; "
        "sys.path.insert(0, sys.argv[1]); comfyui.begin('cuda', sys.argv[2] == 'True', ['--base-directory', '.']); "
        "from comfy.cli_args import args, enables_dynamic_vram; "
        "print(json.dumps([enables_dynamic_vram(), 'torch' in sys.modules, 'comfy_aimdo.control' in sys.modules, "
        "os.environ.get('PYTORCH_CUDA_ALLOC_CONF'), args.cpu, args.base_directory]))"
    )
    variables = {name: v for name, v in inherited_environment().items() if name != "PYTORCH_CUDA_ALLOC_CONF"}
    variables["PYTHONPATH"] = os.pathsep.join((str(PLUGIN), variables.get("PYTHONPATH", "")))
    cuda = torch.version.cuda is not None
    for dynamic in (True, False):
        command = [sys.executable, "-c", code, str(comfyui_path), str(dynamic)]
        printed = subprocess.check_output(command, cwd=tmp_path, env=variables, text=True)
        found = json.loads(printed.splitlines()[-1])
        assert found == [dynamic, False, dynamic, "backend:cudaMallocAsync" if cuda else None, False, "."]


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with (
        session.Session("step", "one step", comfyui=tmp_path) as child,
        pytest.raises(SystemExit, match=r"(?s)one step failed:.*No module named 'comfy'"),
    ):
        child.ask()
    with pytest.raises(SystemExit, match=r"(?s)loading nothing failed:.*No module named 'comfy'"):
        session.run("load", "loading nothing", comfyui=tmp_path, kind="idle", file="")
