"""The peers themselves: what gemlite, mlx and hqq read back is what was packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from peers import tiny_klein
from safetensors.torch import load_file

pytestmark = pytest.mark.parity
VARIANTS = tiny_klein.VARIANTS
SHAPES = [(256, 256), (384, 1024), (128, 384)]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Unpacked pipelines without a tokenizer, by variant; None is dense."""
    folders = {}
    for variant in (*VARIANTS, None):
        folder = tmp_path_factory.mktemp(f"unpacked-{variant}")
        tiny_klein.write_pipeline(folder, variant=variant, te_hidden=128)
        folders[variant] = folder
    return folders


def transformer_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def random_weight(shape: tuple[int, int], variant: str) -> torch.Tensor:
    return tiny_klein.quantized_weight(shape, variant, torch.Generator().manual_seed(7))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero included; both are compared as fp32."""
    return torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unpacked_linears_have_few_levels(unpacked: dict[str | None, Path], variant: str) -> None:
    quantized = 0
    for name, tensor in transformer_state(unpacked[variant]).items():
        assert tensor.dtype == torch.bfloat16
        if tiny_klein.is_quantized(name):
            groups = tensor.float().reshape(tensor.shape[0], -1, 128)
            scale = groups.abs().amax(dim=2, keepdim=True)
            allowed = (groups.abs() == scale) | ((groups == 0) & (variant == "ternary"))
            assert bool(allowed.all()), name
            quantized += 1
    assert quantized == 12 + 2 * 2


@pytest.mark.parametrize("meta_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemlite_linear_reads_back(shape: tuple[int, int], variant: str, meta_dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    gemlite_pack = pytest.importorskip("peers.gemlite_pack")
    weight = random_weight(shape, variant)
    leaves = gemlite_pack.pack_linear(weight, variant, meta_dtype)
    rows, columns = shape
    per_byte = 8 // gemlite_pack.BITS[variant]
    assert leaves["W_q"].dtype == torch.uint8 and leaves["W_q"].shape == (columns // per_byte, rows)
    assert leaves["scales"].dtype == leaves["zeros"].dtype == meta_dtype
    assert leaves["scales"].shape == leaves["zeros"].shape == (columns // 128, rows)
    half = 1.0 if variant == "ternary" else 0.5
    assert torch.equal(leaves["zeros"], -leaves["scales"] * half)
    assert leaves["orig_shape"].tolist() == [rows, columns]
    meta = leaves["metadata"].tolist()
    stored = {torch.float32: 0, torch.float16: 1}[meta_dtype]
    bits = gemlite_pack.BITS[variant]
    assert meta == [0, bits, 128, 2**bits - 1, per_byte, 1, 1, 0, stored, 0, 4, 1]
    assert same_bits(gemlite_pack.dequantize(leaves), weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gemlite_pack_reads_back(unpacked: dict[str | None, Path], tmp_path: Path, variant: str) -> None:
    pytest.importorskip("triton")
    gemlite_pack = pytest.importorskip("peers.gemlite_pack")
    gemlite_pack.write_gemlite_pack(unpacked[variant], tmp_path, variant, text_encoder=False)
    folder = tmp_path / gemlite_pack.TRANSFORMER_FOLDER[variant]
    state = torch.load(folder / "state_dict.pt", weights_only=True, mmap=True)
    dense = transformer_state(unpacked[variant])
    for name, tensor in dense.items():
        if tiny_klein.is_quantized(name):
            layer = name.removesuffix(".weight")
            leaves = {leaf: state.pop(f"{layer}.{leaf}") for leaf in gemlite_pack.LEAVES}
            assert same_bits(gemlite_pack.dequantize(leaves), tensor), name
        else:
            assert torch.equal(state.pop(name), tensor), name
    assert not state
    config = json.loads((folder / "quantization_config.json").read_text(encoding="utf-8"))
    assert (config["bits"], config["quantized_count"], config["skipped_count"]) == (gemlite_pack.BITS[variant], 16, 9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gemlite_fuses_along_dim_1(variant: str) -> None:
    pytest.importorskip("triton")
    gemlite_pack = pytest.importorskip("peers.gemlite_pack")
    fused = random_weight((3 * 256, 256), variant)
    whole = gemlite_pack.pack_linear(fused, variant)
    parts = [gemlite_pack.pack_linear(part, variant) for part in fused.chunk(3)]
    for leaf in ("W_q", "scales", "zeros"):
        assert torch.equal(torch.cat([part[leaf] for part in parts], dim=1), whole[leaf])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mlx_linear_reads_back(shape: tuple[int, int], variant: str) -> None:
    pytest.importorskip("mlx.core")
    from peers import mlx_pack

    weight = random_weight(shape, variant)
    if variant == "ternary":
        weight[0, :128] = 0
    else:
        weight[0, :128] = weight[0, :128].abs()
    parts = mlx_pack.pack_linear(weight, variant)
    rows, columns = shape
    bits = mlx_pack.BITS[variant]
    assert tuple(parts["weight"].shape) == (rows, columns * bits // 32)
    assert mlx_pack.to_torch(parts["scales"]).dtype == torch.bfloat16
    assert tuple(parts["scales"].shape) == tuple(parts["biases"].shape) == (rows, columns // 128)
    assert same_bits(mlx_pack.dequantize(parts, bits), weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mlx_fuses_along_dim_0(variant: str) -> None:
    pytest.importorskip("mlx.core")
    from peers import mlx_pack

    fused = random_weight((3 * 256, 256), variant)
    whole = mlx_pack.pack_linear(fused, variant)
    parts = [mlx_pack.pack_linear(part, variant) for part in fused.chunk(3)]
    for leaf in ("weight", "scales", "biases"):
        assert torch.equal(torch.cat([mlx_pack.to_torch(part[leaf]) for part in parts]), mlx_pack.to_torch(whole[leaf]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gemlite_and_mlx_hold_the_same_bits(variant: str) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("mlx.core")
    gemlite_pack = pytest.importorskip("peers.gemlite_pack")
    from peers import mlx_pack

    weight = random_weight((256, 1024), variant)
    leaves = gemlite_pack.pack_linear(weight, variant)
    parts = mlx_pack.pack_linear(weight, variant)
    words = leaves["W_q"].t().contiguous().view(torch.int32)
    assert torch.equal(words, mlx_pack.to_torch(parts["weight"]).view(torch.int32))
    assert torch.equal(leaves["scales"].t(), mlx_pack.to_torch(parts["scales"]).float())
    assert torch.equal(leaves["zeros"].t(), mlx_pack.to_torch(parts["biases"]).float())


def test_mlx_quantize_alone_keeps_binary_and_breaks_ternary() -> None:
    pytest.importorskip("mlx.core")
    from peers import mlx_pack

    binary = random_weight((64, 512), "binary")
    assert same_bits(mlx_pack.dequantize(mlx_pack.quantize_linear(binary, 1), 1), binary)
    ternary = random_weight((64, 512), "ternary")
    read = mlx_pack.dequantize(mlx_pack.quantize_linear(ternary, 2), 2)
    assert torch.equal(read, torch.where(ternary < 0, ternary.float() / 2, ternary.float()))


@pytest.mark.parametrize("quantizer", ["exact", "mlx"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mlx_pack_reads_back(unpacked: dict[str | None, Path], tmp_path: Path, variant: str, quantizer: str) -> None:
    pytest.importorskip("mlx.core")
    from peers import mlx_pack

    source = unpacked[variant if quantizer == "exact" else None]
    reference = tmp_path / "reference" if quantizer == "mlx" else None
    pack = tmp_path / "pack"
    mlx_pack.write_mlx_pack(source, pack, variant, quantizer=quantizer, reference_folder=reference, text_encoder=False)
    state = load_file(pack / mlx_pack.TRANSFORMER_FOLDER / mlx_pack.WEIGHTS)
    bits = mlx_pack.BITS[variant]
    for name, tensor in transformer_state(reference or source).items():
        if tiny_klein.is_quantized(name):
            layer = name.removesuffix(".weight")
            leaves = ("weight", "scales", "biases")
            parts = {leaf: mlx_pack.to_mlx(state.pop(f"{layer}.{leaf}")) for leaf in leaves}
            assert same_bits(mlx_pack.dequantize(parts, bits), tensor), name
        else:
            assert torch.equal(state.pop(name).float(), tensor.float()), name
    assert not state


def test_hqq_text_encoder_loads(unpacked: dict[str | None, Path], tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    from peers import gemlite_pack, reference

    source = unpacked["ternary"] / "text_encoder"
    target = tmp_path / gemlite_pack.TEXT_ENCODER_FOLDER
    gemlite_pack.hqq_text_encoder(source, target)
    modules = torch.load(target / "qmodel.pt", map_location="cpu", weights_only=True)
    packed = {name: module for name, module in modules.items() if "W_q" in module}
    assert len(packed) == 28 * 7
    layer = packed["model.layers.0.mlp.down_proj"]
    rows, columns = layer["shape"]
    assert (layer["nbits"], layer["group_size"], layer["axis"], layer["packing"]) == (4, 64, 1, "4bit_u8")
    assert layer["W_q"].shape == (rows * columns // 128, 64)
    assert layer["scale"].shape == layer["zero"].shape == (rows * columns // 64, 1)
    assert layer["scale"].dtype == layer["zero"].dtype == torch.float16

    state = reference.hqq_state(target / "qmodel.pt")
    original = load_file(source / "model.safetensors")
    assert set(state) == {*original, "lm_head.weight"}
    for name, tensor in original.items():
        error = (state[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < 0.12, f"{name}: relative error {error}"  # 16 levels over 64 Gaussian values: about 0.09
    low = layer["W_q"] & 15
    high = layer["W_q"] >> 4
    formula = (torch.cat([high, low]).float() - layer["zero"].float()) * layer["scale"].float()
    assert torch.equal(formula.reshape(rows, columns), state["model.layers.0.mlp.down_proj.weight"])


def test_mlx_text_encoder_loads(unpacked: dict[str | None, Path], tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from peers import mlx_pack, reference

    source = unpacked["ternary"] / "text_encoder"
    mlx_pack.mlx_text_encoder(source, tmp_path)
    state = reference.mlx_state(tmp_path)
    original = load_file(source / "model.safetensors")
    assert set(state) == set(original)
    for name, tensor in original.items():
        error = (state[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < 0.12, f"{name}: relative error {error}"  # 16 levels over 64 Gaussian values: about 0.09


def test_reference_is_repeatable(unpacked: dict[str | None, Path]) -> None:
    """The latent is what the picture was decoded from, and another seed gives another one."""
    from peers import reference

    embeds = torch.randn(1, 512, 3 * 128, generator=torch.Generator().manual_seed(1))
    run = {
        seed: reference.reference_latent(unpacked["ternary"], None, 96, 64, seed=seed, prompt_embeds=embeds)
        for seed in (0, 1)
    }
    latent, picture, used = run[0]
    assert latent.shape == (1, 128, 4, 6) and latent.dtype == torch.float32
    assert picture.shape == (64, 96, 3) and str(picture.dtype) == "uint8"
    assert torch.equal(used, embeds)
    assert bool(latent.isfinite().all()) and 0.3 < latent.std() < 5 and picture.std() > 10
    assert (run[1][0] - latent).abs().mean() > 0.1
