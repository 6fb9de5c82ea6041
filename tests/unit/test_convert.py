"""python -m bonsai_ops.convert: the same native file from every format, or nothing and one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import reason
from random_weights import random_weight
from safetensors.torch import load_file, save_file

from bonsai_ops import convert
from bonsai_ops.tools.synthetic import TINY, TextGeometry, write_dense, write_gemlite, write_mlx, write_text_encoder
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import native, open_pack
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_text_encoder, open_transformer, read_weights

REPOSITORY = Path(__file__).resolve().parents[2]
MLX_FILE = "diffusion_pytorch_model.safetensors"
VARIANTS = {"binary": 1, "ternary": 2}
FORMATS = ["mlx", "gemlite", "diffusers", "unpacked"]


def unpack(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """bf16 weights under diffusers names from MLX tensors: w = scales * code + biases, codes from the low bits up."""
    weights = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.dtype == torch.uint32:
            words = tensor.view(torch.int32).numpy().view(np.uint32)
            shifts = np.arange(0, 32, bits, dtype=np.uint32)
            codes = ((words[:, :, None] >> shifts) & np.uint32(2**bits - 1)).reshape(words.shape[0], -1)
            scale, zero = (tensors[f"{layer}.{t}"].float().numpy().repeat(128, axis=1) for t in ("scales", "biases"))
            weights[name] = torch.from_numpy(codes.astype(np.float32) * scale + zero).bfloat16()
        elif not name.endswith((".scales", ".biases")):
            weights[name] = tensor
    return weights


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<variant>/<format>/: the same weights in each format."""
    folder = tmp_path_factory.mktemp("packs")
    for variant, bits in VARIANTS.items():
        write_mlx(folder / variant / "mlx" / "transformer-packed-mflux" / MLX_FILE, variant, TINY)
        gemlite = folder / variant / "gemlite" / f"transformer-gemlite-int{bits}" / "state_dict.pt"
        write_gemlite(gemlite, variant, TINY)
        diffusers = folder / variant / "diffusers" / "transformer"
        diffusers.mkdir(parents=True)
        save_file(torch.load(gemlite, weights_only=True), diffusers / MLX_FILE)
        (diffusers / "config.json").write_text(json.dumps({"quantization_config": {"bits": bits, "group_size": 128}}))
        unpacked = folder / variant / "unpacked" / "transformer"
        unpacked.mkdir(parents=True)
        tensors = load_file(folder / variant / "mlx" / "transformer-packed-mflux" / MLX_FILE)
        save_file(unpack(tensors, bits), unpacked / MLX_FILE)
    return folder


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_format_becomes_the_same_native_file(packs: Path, tmp_path: Path, variant: str) -> None:
    """Tensors equal to the bit, with the values of the unpacked weights; the record names the source and its sha256."""
    found = {}
    for name in FORMATS:
        target = tmp_path / f"{name}.safetensors"
        assert run(packs / variant / name, target) == 0
        found[name] = load_file(target)
        source = open_pack(target).source
        assert source["file"] in (MLX_FILE, "state_dict.pt") and len(source["sha256"]) == 64
    assert run(tmp_path / "mlx.safetensors", tmp_path / "again.safetensors") == 0
    found["again"] = load_file(tmp_path / "again.safetensors")
    assert open_pack(tmp_path / "again.safetensors").source == open_pack(tmp_path / "mlx.safetensors").source
    for name, tensors in found.items():
        assert tensors.keys() == found["mlx"].keys(), name
        for key, tensor in tensors.items():
            assert tensor.dtype == found["mlx"][key].dtype and torch.equal(tensor, found["mlx"][key]), (name, key)
    entries = open_pack(tmp_path / "gemlite.safetensors").entries
    dense = load_file(packs / variant / "unpacked" / "transformer" / MLX_FILE)
    linear = entries["single_blocks.1.linear1.weight"].load()
    assert linear.scheme == variant
    expected = dense["single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"]
    assert torch.equal(linear.dequantize(torch.bfloat16), expected)
    qkv = torch.cat([dense[f"transformer_blocks.0.attn.add_{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(entries["double_blocks.0.txt_attn.qkv.weight"].load().dequantize(torch.bfloat16), qkv)


def test_a_model_of_another_family_keeps_its_record(tmp_path: Path) -> None:
    """Architecture and configuration: without them the copy was taken for a FLUX.2 and refused."""
    model = {"class": "SDXL", "model_type": "EPS", "unet_config": {"x": [1, None]}, "sampling_settings": {"s": 2.5}}
    weights = {"input_blocks.1.weight": random_weight("ternary", "trit5", 64, 128), "out.bias": torch.ones(3)}
    first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
    native.write(first, weights, native.make_record(weights, {"patched": "SDXL"}, "SDXL", model))
    assert run(first, second) == run(second, third) == 0
    for path in (second, third):
        pack = open_transformer(path)
        assert (pack.architecture, pack.configuration, pack.source) == ("SDXL", model, {"patched": "SDXL"})
    assert load_file(second).keys() == load_file(first).keys() and third.read_bytes() == second.read_bytes()


def test_what_would_be_refused_is_not_written(
    packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is opened as a loader opens it before it gets its name."""
    monkeypatch.setattr(native, "make_record", lambda *_: native.NativeRecord("ternary", {"gone": {}}))
    assert "could not be read again" in refused(capsys, packs / "ternary" / "mlx", tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_sizes(packs: Path, tmp_path: Path) -> None:
    """The native file is smaller than what it came from."""
    for variant in VARIANTS:
        target = tmp_path / f"{variant}.safetensors"
        assert run(packs / variant / "mlx", target) == 0
        for source in (packs / variant).rglob("*.*"):
            if source.suffix in (".pt", ".safetensors"):
                assert target.stat().st_size < source.stat().st_size


def test_a_folder_as_target(packs: Path, tmp_path: Path) -> None:
    assert run(packs / "binary" / "mlx", tmp_path) == 0
    assert run(packs / "binary" / "gemlite" / "transformer-gemlite-int1" / "state_dict.pt", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlx-bonsai.safetensors", "state_dict-bonsai.safetensors"]


def test_a_target_in_a_new_folder(packs: Path, tmp_path: Path) -> None:
    assert run(packs / "binary" / "mlx", tmp_path / "a" / "b" / "c.safetensors") == 0
    assert (tmp_path / "a" / "b" / "c.safetensors").is_file()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence on standard error of a call that must end with exit code 1."""
    capsys.readouterr()
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.strip().splitlines()) == 1
    return printed.err


def test_an_existing_target_is_kept(packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"mine")
    error = reason(refused(capsys, packs / "binary" / "mlx", target).strip(), target)
    assert error.startswith("exists. ") and "--overwrite" in error
    assert target.read_bytes() == b"mine"
    assert run(packs / "binary" / "mlx", target, "--overwrite") == 0
    assert open_pack(target).format == "native"


@pytest.mark.parametrize("link", ["same path", "hard link", "symbolic link"])
def test_the_source_is_never_the_target(
    packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str
) -> None:
    """Not even when overwriting is allowed, and under another name."""
    source = tmp_path / "w.safetensors"
    assert run(packs / "binary" / "mlx", source) == 0
    before, target = source.read_bytes(), tmp_path / "other.safetensors"
    if link == "same path":
        target = source
    elif link == "hard link":
        os.link(source, target)
    else:
        try:
            target.symlink_to(source)
        except OSError:
            pytest.skip("this system does not allow symbolic links")
    assert "is the file that is being read" in refused(capsys, source, target, "--overwrite")
    assert source.read_bytes() == before


def test_another_ending_is_refused(packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, packs / "binary" / "mlx", tmp_path / "w.pt")
    assert "w.pt: ends in '.pt'" in error and ".safetensors" in error
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "w.safetensors"
    assert "does not exist" in refused(capsys, tmp_path / "nothing", target)
    write_dense(tmp_path / "dense.safetensors", TINY)
    assert "Patch to BitLinear" in refused(capsys, tmp_path / "dense.safetensors", target)
    assert not target.parent.exists()


def test_paths_that_cannot_be_looked_at(packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name too long for a file, and a link to itself, as source and as target."""
    source, long, loop = packs / "binary" / "mlx", tmp_path / ("a" * 300), tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path, said in ((long, "File name too long"), (loop, "symbolic links")):
        assert said in refused(capsys, path, tmp_path / "target.safetensors")
    assert "File name too long" in refused(capsys, source, long.with_suffix(".safetensors"))
    assert "exists" in refused(capsys, source, loop)
    assert list(tmp_path.iterdir()) == [loop]


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    """Of another user: the superuser, who enters any, becomes another one first."""
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "theirs").chmod(0)
    code = "import os; from bonsai_ops import convert; os.geteuid() or os.seteuid(65534); "
    code += "raise SystemExit(convert.main(['theirs/w.safetensors', 'target.safetensors']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be read (Permission denied). " in done.stderr


def test_the_cure_is_one_for_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text encoder was to be loaded with a node."""
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8)}, tmp_path / "encoder.safetensors")
    path = tmp_path / "encoder.safetensors"
    said = reason(refused(capsys, path, tmp_path / "out.safetensors").strip(), path)
    assert said.startswith("is a language model") and "Load it with" not in said
    assert said.endswith("Give the transformer of a Bonsai pack, or its folder.")


def test_damage_found_while_packing_leaves_nothing(
    packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(packs / "ternary" / "mlx" / "transformer-packed-mflux" / MLX_FILE)
    tensors["single_transformer_blocks.1.attn.to_out.weight"].view(torch.uint8)[-1, -1] = 0xFF
    save_file(tensors, tmp_path / "damaged.safetensors")
    assert "fourth level" in refused(capsys, tmp_path / "damaged.safetensors", tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.safetensors"]


def test_a_full_disk_leaves_nothing(packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The system refuses to write beyond 64 KiB, with an OSError as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        error = refused(capsys, packs / "binary" / "mlx", tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in error
    assert list(tmp_path.iterdir()) == []


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which finds no ComfyUI."""
    line = [sys.executable, "-m", "bonsai_ops.convert", *(str(a) for a in arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def test_the_command_line(packs: Path, tmp_path: Path) -> None:
    """0 and one line on standard output; 1 and one on standard error, no traceback."""
    target = tmp_path / "w.safetensors"
    done = command(packs / "ternary" / "gemlite", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{target}: ") and " MB in " in done.stdout
    assert run(packs / "ternary" / "gemlite", tmp_path / "x.safetensors") == 0
    assert target.read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    done = command(packs / "ternary" / "gemlite", target)
    assert (done.returncode, done.stdout) == (1, "")
    assert reason(done.stderr.strip(), target) == "exists. Choose another name or say --overwrite."


@pytest.mark.parametrize("arguments", [(), ("only-a-source",), ("a", "b", "--unknown")], ids=str)
def test_wrong_arguments(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert "usage: python -m bonsai_ops.convert" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False])
def test_a_text_encoder_becomes_a_native_file(tmp_path: Path, whole: bool) -> None:
    """The same codes and tables, mapped from the file and not repacked; all layers if they are all there."""
    geometry = TextGeometry(hidden=256, mlp=512, heads=2, key_heads=1, vocabulary=320)
    write_text_encoder(tmp_path / "mlx", geometry)
    source, target = tmp_path / "mlx" / "model.safetensors", tmp_path / "native.safetensors"
    if not whole:
        tensors = load_file(source)
        del tensors["model.norm.weight"]
        save_file(tensors, source)
    assert run(source.parent, target) == 0
    asked, _ = open_text_encoder(source, whole=whole)
    expected, found = read_weights(asked), read_weights(open_text_encoder(target, whole=whole)[0])
    assert found.keys() == expected.keys() and open_pack(target).format == "native"
    for name, weight in expected.items():
        if isinstance(weight, PackedWeight):
            assert found[name].nbytes == weight.nbytes and torch.equal(found[name].codes, weight.codes)
            assert torch.equal(found[name].dequantize(), weight.dequantize())
        else:
            assert torch.equal(found[name], weight)
    if not whole:
        with pytest.raises(PackError, match="enough for prompts only"):
            open_text_encoder(target, whole=True)
