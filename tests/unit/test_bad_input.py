"""What is not a usable pack is refused in a sentence: which file, which key, what was found, expected, and the cure."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import reason
from safetensors.torch import load_file, save_file

from bonsai_ops.tools.synthetic import TINY, write_dense, write_gemlite, write_mlx
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.read import open_text_encoder, open_transformer, read_weights

MLX_FILE = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_k"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole tiny pack of each kind."""
    folder = tmp_path_factory.mktemp("packs")
    write_mlx(folder / "mlx" / MLX_FILE, "ternary", TINY)
    write_gemlite(folder / "gemlite" / "state_dict.pt", "ternary", TINY)
    write_dense(folder / "dense.safetensors", TINY)
    return folder


@pytest.fixture
def change_mlx(packs: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """A function from a change of the tensors to a changed copy of the MLX pack."""

    def change(apply: Callable[[Tensors], object]) -> Path:
        tensors = load_file(packs / "mlx" / MLX_FILE)
        apply(tensors)
        shutil.copy(packs / "mlx" / "quantization_config.json", tmp_path)
        save_file(tensors, tmp_path / MLX_FILE)
        return tmp_path / MLX_FILE

    return change


@pytest.fixture
def change_gemlite(packs: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """The same for the gemlite pack."""

    def change(apply: Callable[[Tensors], object]) -> Path:
        tensors = torch.load(packs / "gemlite" / "state_dict.pt", weights_only=True)
        apply(tensors)
        torch.save(tensors, tmp_path / "state_dict.pt")
        return tmp_path / "state_dict.pt"

    return change


@pytest.fixture
def tiny_vae(whole_vae: Path, tmp_path: Path) -> Path:
    """A pack folder with nothing but its VAE, which is narrower than the published one and loads."""
    shutil.copytree(whole_vae / "vae", tmp_path / "vae")
    return tmp_path


@pytest.fixture(scope="module")
def whole_vae(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Path:
    from bonsai_ops.host.vae import load_vae
    from bonsai_ops.tools.synthetic import write_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder)
    load_vae(folder)
    return folder


def refuse(path: Path, *pieces: str, headers_only: bool = True) -> str:
    """The message of the PackError for `path`, which names it, has the pieces in that order and is one line."""
    with pytest.raises(PackError) as caught:
        pack = open_transformer(path)
        if not headers_only:
            read_weights(pack)
    message = reason(caught.value, path)
    assert message.endswith(".") and "\n" not in message
    assert len(message) < 600, message
    place = 0
    for piece in pieces:
        place = message.find(piece, place)
        assert place >= 0, f"{piece!r} is not in its place in: {message}"
    return message


def test_the_undamaged_packs_are_read(packs: Path) -> None:
    """So that the refusals below come from the damage."""
    for folder in ("mlx", "gemlite"):
        read_weights(open_transformer(packs / folder))


CONTENTS = {
    "empty": b"",
    "short": b"\x08",
    "text": b"<!DOCTYPE html><html>Please log in to download this file</html>" * 9,
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:b21737bdf02690b7\nsize 1425271472\n",
    "random": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
}


NO_TEXTS = [name for name in CONTENTS if name not in ("text", "lfs pointer")]
"""Those are told from a damaged file, see test_stand_in.py."""


@pytest.mark.parametrize("content", NO_TEXTS)
def test_no_safetensors_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENTS[content])
    refuse(path, "is not a safetensors file", f"{len(CONTENTS[content])} bytes", "Give a .safetensors file")


@pytest.mark.parametrize("content", NO_TEXTS)
def test_no_torch_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state_dict.pt"
    path.write_bytes(CONTENTS[content])
    refuse(path, "is not a complete torch file", f"{len(CONTENTS[content])} bytes", "download it again")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"{}}", "header that is not JSON"),
        (b"\xff\xfe{}", "header that is not JSON"),
        (b"[1, 2]", "no table of tensors"),
        (b'{"a": 1}', "no table of tensors"),
        (b'{"a": {"dtype": "F32"}}', "no table of tensors"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}', "no table of tensors"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, "x"]}}', "no table of tensors"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "damaged header"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "damaged header"),
        (b'{"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}', "has dtype Q7. Expected one of F64"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}', "bytes, its header describes"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: bytes, found: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refuse(path, found)


@pytest.mark.parametrize("name", ["a.txt", "archive/a.txt", "archive/data.pkl"])
def test_a_zip_that_is_no_torch_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "state_dict.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "hello")
    refuse(path, "is not a readable torch file", "download it again")


@pytest.mark.parametrize("part", ["everything", "data.pkl", "data/0", "data/5"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_torch_file_that_was_zipped_again(packs: Path, tmp_path: Path, part: str, method: int) -> None:
    """torch maps its members as they lie: compressed bytes came out as weights."""
    path = tmp_path / "state_dict.pt"
    with zipfile.ZipFile(packs / "gemlite" / path.name) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            again = part == "everything" or name.endswith(f"/{part}")
            new.writestr(name, old.read(name), method if again else zipfile.ZIP_STORED)
    refuse(path, part.removeprefix("everything"), "is compressed or encrypted", "use the file as it was published")


def test_a_text_encoder_that_was_zipped_again(tmp_path: Path) -> None:
    torch.save({"embed_tokens": {"weight": torch.zeros(64, 64)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "qmodel.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(PackError, match=r"qmodel\.pt: .*: is compressed or encrypted"):
        open_text_encoder(tmp_path / "qmodel.pt")


@pytest.mark.parametrize("suffix", [".ckpt", ".onnx", ""])
def test_other_endings(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bonsai{suffix}"
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    refuse(path, f"unknown ending {suffix!r}", "Expected a transformer ending in .safetensors", "mlx", "gemlite, gguf")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    refuse(tmp_path / "missing.safetensors", "does not exist", "models/bonsai")


def test_a_folder_without_a_transformer(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no transformer", "transformer-packed-mflux", "download the whole repository")


def test_a_folder_with_two_transformers(packs: Path, tmp_path: Path) -> None:
    shutil.copytree(packs / "mlx", tmp_path / "transformer-packed-mflux")
    shutil.copytree(packs / "gemlite", tmp_path / "transformer-gemlite-int2")
    refuse(tmp_path, "several transformers", MLX_FILE, "state_dict.pt", "Choose one of these files")


def test_the_text_encoder_of_a_gemlite_pack(tmp_path: Path) -> None:
    torch.save({"layers.0.mlp.up_proj": {"W_q": torch.zeros(8, 64, dtype=torch.uint8)}}, tmp_path / "qmodel.pt")
    refuse(tmp_path / "qmodel.pt", "is a text encoder (format hqq)", 'Load it with "Load Bonsai Text Encoder"')


def test_a_dense_model(packs: Path) -> None:
    path = packs / "dense.safetensors"
    found = "has groups of more than three levels, so this is no 1-bit or ternary model"
    refuse(path, "double_blocks.0.", found, "Load Diffusion Model", "Patch to BitLinear", headers_only=False)


@pytest.mark.parametrize("cut", [1, 1000, 200_000, 1_000_000])
@pytest.mark.parametrize("file", [f"mlx/{MLX_FILE}", "gemlite/state_dict.pt"])
def test_truncated_files(packs: Path, tmp_path: Path, file: str, cut: int) -> None:
    path = tmp_path / Path(file).name
    shutil.copy(packs / file, path)
    size = path.stat().st_size - cut
    os.truncate(path, size)
    refuse(path, f"{size} bytes", "download it again")


@pytest.mark.parametrize("layer", [LAYER, "single_transformer_blocks.1.attn.to_out"])
def test_a_missing_layer(change_mlx: Callable, change_gemlite: Callable, layer: str) -> None:
    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            del tensors[name]

    for change in (change_mlx, change_gemlite):
        refuse(
            change(remove),
            f"{layer}.weight: is missing (1 of 33 tensors are)",
            "file is incomplete",
            "as it was published",
        )


def test_an_extra_layer(change_mlx: Callable, change_gemlite: Callable) -> None:
    for change in (change_mlx, change_gemlite):
        path = change(lambda tensors: tensors.update({"stranger.weight": torch.ones(4, 4)}))
        refuse(path, "stranger.weight: does not belong to a FLUX.2 transformer of 1 + 2 blocks and hidden size 256")


@pytest.mark.parametrize("leaf", ["scales", "biases"])
def test_missing_mlx_tables(change_mlx: Callable, leaf: str) -> None:
    refuse(change_mlx(lambda t: t.pop(f"{LAYER}.{leaf}")), f"{LAYER}.{leaf}: is missing", f"{LAYER}.weight needs it")


@pytest.mark.parametrize("leaf", ["scales", "zeros", "metadata", "orig_shape"])
def test_missing_gemlite_tables(change_gemlite: Callable, leaf: str) -> None:
    refuse(change_gemlite(lambda t: t.pop(f"{LAYER}.{leaf}")), f"{LAYER}.{leaf}: is missing", "W_q, scales, zeros")


def test_tables_without_codes(change_mlx: Callable, change_gemlite: Callable) -> None:
    refuse(change_mlx(lambda t: t.pop(f"{LAYER}.weight")), f"{LAYER}.", "stands alone", f"{LAYER}.weight")
    refuse(change_gemlite(lambda t: t.pop(f"{LAYER}.W_q")), f"{LAYER}.", "stands alone", f"{LAYER}.W_q")


def edit(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A change of one tensor."""

    def apply(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name]).clone().contiguous()

    return apply


def test_wrong_shapes_of_mlx(change_mlx: Callable) -> None:
    """A narrower layer, a table of another height, and biases unlike the scales."""

    def halve(tensors: Tensors) -> None:
        for leaf in ("weight", "scales", "biases"):
            tensors[f"{LAYER}.{leaf}"] = tensors[f"{LAYER}.{leaf}"].view(256, -1)[:128].clone()

    refuse(change_mlx(halve), f"{LAYER}.weight: has shape [128, 256]", "Expected [256, 256] for hidden size 256")
    refuse(
        change_mlx(edit(f"{LAYER}.scales", lambda t: t[:128])),
        f"{LAYER}.weight: is torch.uint32 [256, 16] with scales [128, 2]",
        "Expected u32 [N, K b / 32]",
    )
    refuse(
        change_mlx(edit(f"{LAYER}.biases", lambda t: t[:, :1])),
        f"{LAYER}.biases: has shape [256, 1]",
        "Expected [256, 2]",
    )
    refuse(change_mlx(edit(f"{LAYER}.scales", lambda t: t.to(torch.int32))), f"{LAYER}.scales: is torch.int32", "bf16")
    refuse(change_mlx(edit(f"{LAYER}.weight", lambda t: t.view(torch.int32))), f"{LAYER}.weight: is torch.int32")


def test_wrong_shapes_of_gemlite(change_gemlite: Callable) -> None:
    for leaf, shape in (("W_q", [64, 256]), ("scales", [2, 256]), ("zeros", [2, 256])):
        path = change_gemlite(edit(f"{LAYER}.{leaf}", lambda t: t[:, :128]))
        refuse(path, f"{LAYER}.{leaf}: has shape [{shape[0]}, 128]", f"Expected {shape} for a layer of 256 x 256")
    path = change_gemlite(edit(f"{LAYER}.orig_shape", lambda t: t * 2))
    refuse(path, f"{LAYER}.W_q: has shape [64, 256]", "Expected [128, 512] for a layer of 512 x 512")
    path = change_gemlite(edit(f"{LAYER}.orig_shape", lambda t: -t))
    refuse(path, f"{LAYER}.orig_shape: says -256 x -256", "groups of 128")
    path = change_gemlite(edit(f"{LAYER}.scales", lambda t: t.double()))
    refuse(path, f"{LAYER}.scales: is torch.float64", "Expected torch.float32")


def test_a_wrong_dense_shape(change_mlx: Callable, change_gemlite: Callable) -> None:
    for change in (change_mlx, change_gemlite):
        path = change(edit("norm_out.linear.weight", lambda t: t[:256]))
        refuse(path, "norm_out.linear.weight: has shape [256, 256]", "Expected [512, 256]")


def test_a_wrong_dense_dtype(change_mlx: Callable, change_gemlite: Callable) -> None:
    refuse(
        change_mlx(edit("proj_out.weight", lambda t: t.to(torch.float8_e4m3fn))),
        "proj_out.weight: is torch.float8_e4m3fn [128, 256]",
        "Expected bf16, fp16 or fp32",
    )
    refuse(change_gemlite(edit("proj_out.weight", lambda t: t.int())), "proj_out.weight: is torch.int32 [128, 256]")


def test_a_gemlite_layer_that_is_dense_and_packed(change_gemlite: Callable) -> None:
    path = change_gemlite(lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(256, 512).bfloat16()}))
    refuse(
        path, f"{LAYER}.weight: stands beside {LAYER}.W_q", "A layer is dense or packed. Use state_dict.pt as it was"
    )


def test_a_wrong_group_size(change_mlx: Callable, change_gemlite: Callable) -> None:
    path = change_mlx(lambda tensors: None)
    (path.parent / "quantization_config.json").write_text(json.dumps({"bits": 2, "group_size": 96}))
    refuse(path, ".weight: has", "words and", "groups a row", "groups of 96", "quantization_config.json beside it")
    for index, value in ((1, 3), (2, 48), (10, 1)):

        def spoil(tensor: torch.Tensor, index: int = index, value: int = value) -> torch.Tensor:
            tensor[index] = value
            return tensor

        path = change_gemlite(edit(f"{LAYER}.metadata", spoil))
        refuse(
            path, f"{LAYER}.metadata: says", str(value), "Expected 1, 2 or 4 bits, a multiple of 32 and mode 4, 3, 2"
        )
    path = change_gemlite(edit(f"{LAYER}.metadata", lambda t: t.index_fill(0, torch.tensor([2]), 64)))
    refuse(path, f"{LAYER}.scales: has shape [2, 256]", "Expected [4, 256]")


@pytest.mark.parametrize("content", [{"group_size": 64}, {"quantization": {"group_size": 64, "bits": 4}}])
def test_a_json_of_another_model(change_mlx: Callable, content: dict) -> None:
    """Two-bit codes in groups of 128 look like four-bit codes in groups of 64: the shapes refuse, the JSON is named."""
    path = change_mlx(lambda tensors: None)
    (path.parent / "quantization_config.json").unlink()
    (path.parent / "config.json").write_text(json.dumps(content))
    refuse(path, "has shape", "read as 4 bit codes in groups of 64 because config.json beside it says so", "Expected")
    (path.parent / "config.json").write_text(json.dumps({"group_size": 64, "bits": 2}))
    refuse(path, "words and", "read as 2 bit codes in groups of 64 because config.json beside it says so")
    (path.parent / "config.json").unlink()
    open_transformer(path)


def test_a_json_that_is_damaged(change_mlx: Callable) -> None:
    path = change_mlx(lambda tensors: None)
    (path.parent / "quantization_config.json").write_text('{"bits": 2')
    with pytest.raises(PackError, match=r"quantization_config\.json: is not JSON .*\. Download it again\."):
        open_transformer(path)


def test_code_3_in_a_ternary_pack(change_mlx: Callable, change_gemlite: Callable) -> None:
    """Row 5, columns 16 .. 19 of to_k; the headers are sound, so it is seen when the layer is packed."""
    found = "has code 3, a fourth level, in a ternary weight"

    def spoil_mlx(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8)[5, 4] = 0xFF
        return tensor

    def spoil_gemlite(tensor: torch.Tensor) -> torch.Tensor:
        tensor[4, 5] = 0xFF
        return tensor

    for path in (
        change_mlx(edit(f"{LAYER}.weight", spoil_mlx)),
        change_gemlite(edit(f"{LAYER}.W_q", spoil_gemlite)),
    ):
        refuse(path, "img_attn.qkv.weight", "row 261, column 16", found, "ownload", headers_only=False)


def test_a_scale_that_is_not_a_number(change_mlx: Callable) -> None:
    path = change_mlx(edit(f"{LAYER}.scales", lambda t: t * float("nan")))
    refuse(path, "img_attn.qkv.weight", "the scale table holds a value that is not finite", headers_only=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["proj_out.weight", "norm_out.linear.weight", "transformer_blocks.0.attn.norm_q.weight"]
)
def test_a_dense_tensor_that_is_not_finite(
    change_mlx: Callable, change_gemlite: Callable, name: str, bad: float
) -> None:
    """It made a black picture."""

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.reshape(-1)[-1] = bad
        return tensor

    for change in (change_mlx, change_gemlite):
        refuse(change(edit(name, spoil)), "holds a value that is not finite", "ownload", headers_only=False)


def test_an_unpacked_weight_that_is_not_finite(packs: Path, tmp_path: Path) -> None:
    tensors = load_file(packs / "dense.safetensors")
    name = "double_blocks.0.img_attn.qkv.weight"
    tensors[name][3, 3] = float("nan")
    save_file(tensors, tmp_path / "dense.safetensors")
    pack = open_transformer(tmp_path / "dense.safetensors")
    with pytest.raises(PackError, match=rf"{name}: holds a value that is not finite\. Download"):
        pack.entries[name].weight()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vae_that_is_not_finite(tiny_vae: Path, comfyui_path: Path, bad: float) -> None:
    from bonsai_ops.host.vae import load_vae

    path = tiny_vae / "vae" / MLX_FILE
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"][1] = bad
    save_file(tensors, path)
    with pytest.raises(PackError, match=r"decoder\.conv_in\.bias: holds a value that is not finite\. Download"):
        load_vae(tiny_vae)


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_runs_nothing(change_gemlite: Callable, tmp_path: Path) -> None:
    """The mark is made by an ordinary unpickler, so it would be seen, and not by ours."""
    mark = tmp_path / "harm"
    path = change_gemlite(lambda tensors: tensors.update({"harm": Harm(mark)}))
    message = refuse(path, "holds more than tensors and was not opened", "mkdir", "use the MLX pack (safetensors)")
    assert "weights_only" not in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Harm(mark)))
    assert mark.is_dir()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"a.weight": 3}, "a.weight: is a int"),
        ({1: 2}, "1: is a"),
    ],
    ids=str,
)
def test_a_pickle_of_other_things(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "state_dict.pt")
    refuse(tmp_path / "state_dict.pt", found, "Expected")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_a_full_memory_is_no_damage(packs: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A download that is as it should be was to be repeated because there was no memory to read it."""

    def load(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)) as caught:
        open_transformer(packs / "gemlite")
    assert caught.value is error


def test_a_pickle_with_flipped_bytes(packs: Path, tmp_path: Path) -> None:
    """Whatever the damage to the index of the file: it is read, or refused as a PackError."""
    content = (packs / "gemlite" / "state_dict.pt").read_bytes()
    with zipfile.ZipFile(packs / "gemlite" / "state_dict.pt") as archive:
        index = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    begin, rng, path, refused = content.index(index), random.Random(0), tmp_path / "state_dict.pt", 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 10])):
            damaged[begin + rng.randrange(len(index))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            open_transformer(path)
        except PackError as error:
            assert "\n" not in reason(error, path)
            refused += 1
    assert refused > 50


FOREIGN = {
    "FLUX.1": (
        ["double_blocks.0.img_mod.lin.weight", "img_in.weight", "vector_in.in_layer.weight"],
        "is a FLUX.1 model",
    ),
    "FLUX.1 diffusers": (["transformer_blocks.0.attn.to_q.weight", "time_text_embed.x.weight"], "is a FLUX.1 model"),
    "Qwen3": (
        ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"],
        "a text encoder",
    ),
    "Qwen3 without prefix": (["embed_tokens.weight", "layers.0.mlp.up_proj.weight"], "a text encoder"),
    "VAE": (["encoder.down_blocks.0.resnets.0.norm1.weight", "bn.running_mean"], "is a VAE"),
    "VAE of BFL": (["decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"], "is a VAE"),
    "LoRA": (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "is a LoRA"),
    "LoRA of kohya": (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "is a LoRA"),
    "Z-Image": (["cap_embedder.0.weight", "layers.0.attention.qkv.weight", "noise_refiner.0.x.weight"], "Z-Image"),
    "SDXL": (
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
        "a checkpoint",
    ),
    "Wan": (["blocks.0.self_attn.q.weight", "patch_embedding.weight"], "not of the FLUX.2 family"),
    "nothing known": (["a.weight"], "is not a FLUX.2 transformer: it has a.weight and no img_in"),
    "no tensors": ([], "is not a FLUX.2 transformer: it has no tensors"),
}
CURES = {
    "FLUX.1": "Load Diffusion Model",
    "Qwen3": "Load Bonsai Text Encoder",
    "VAE": "Load VAE",
    "LoRA": "LoraLoaderModelOnly",
    "SDXL": "Load Checkpoint",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_models(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Said by name, with the node that loads it, whatever dtype they are stored in."""
    names, found = FOREIGN[kind]
    save_file({name: torch.ones(2, 2).to(dtype) for name in names}, tmp_path / "other.safetensors")
    if kind == "nothing known":
        found = "is not a FLUX.2 transformer: it has a.weight and no double_stream_modulation_img.lin.weight"
    refuse(tmp_path / "other.safetensors", found, CURES.get(kind, ""))


def test_a_vae_with_its_counter(tmp_path: Path) -> None:
    """The VAE of the packs holds an int64 tensor, which must not hide what the file is."""
    tensors = {"encoder.down_blocks.0.x.weight": torch.ones(2), "bn.num_batches_tracked": torch.tensor(7)}
    save_file(tensors, tmp_path / "vae.safetensors")
    refuse(tmp_path / "vae.safetensors", "is a VAE: it has encoder.down_blocks.0.x.weight", "Load VAE")


def test_an_fp8_klein(packs: Path, tmp_path: Path) -> None:
    tensors = {
        n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in load_file(packs / "dense.safetensors").items()
    }
    tensors |= {f"{n.removesuffix('.weight')}.weight_scale": torch.ones(1) for n, t in tensors.items() if t.ndim == 2}
    save_file(tensors, tmp_path / "fp8.safetensors")
    refuse(
        tmp_path / "fp8.safetensors",
        ".weight: is torch.float8_e4m3fn",
        "Expected bf16, fp16 or fp32 weights, or a Bonsai",
    )


@pytest.mark.parametrize("architecture", ["flux2", "SDXL"])
def test_a_native_file_with_no_packed_layer(packs: Path, tmp_path: Path, architecture: str) -> None:
    record = {"version": 1, "variant": "ternary", "architecture": architecture, "layers": {}}
    save_file(load_file(packs / "dense.safetensors"), tmp_path / "n.safetensors", {"bonsai": json.dumps(record)})
    refuse(tmp_path / "n.safetensors", "has no packed layer")


def sparse(path: Path, begin: bytes, size: int) -> Path:
    """A file of `size` bytes that takes no room on disk."""
    path.write_bytes(begin)
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("wrong", ["size", "incomplete", "other model", "no header", "torch file"])
def test_a_large_file_is_refused_at_once(tmp_path: Path, wrong: str) -> None:
    """8 GB, of which nothing but the header is read: below 2 s."""
    size = 8_000_000_000
    names = {
        "other model": ["model.layers.0.mlp.up_proj.weight"],
        "incomplete": ["double_stream_modulation_img.lin.weight", "img_in.weight", "txt_in.weight"],
    }.get(wrong, ["img_in.weight"])
    width = size // len(names) // 256 * 256
    header = {
        name: {
            "dtype": "U8" if wrong == "size" else "BF16",
            "shape": [128, width // 256],
            "data_offsets": [i * width, (i + 1) * width],
        }
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    begin = b"" if wrong in ("no header", "torch file") else len(text).to_bytes(8, "little") + text
    end = len(begin) + width * len(names)
    path = tmp_path / ("state_dict.pt" if wrong == "torch file" else "model.safetensors")
    sparse(path, begin, end - 1 if wrong == "size" else end)
    found = {
        "size": "its header describes",
        "incomplete": "is missing",
        "other model": "a text encoder",
        "no header": "is not a safetensors file",
        "torch file": "is not a complete torch file",
    }[wrong]
    started = time.perf_counter()
    refuse(path, found)
    assert time.perf_counter() - started < 2


def test_transformer_without_blocks(tmp_path: Path) -> None:
    """Embedders alone are no model: one sentence instead of an empty one."""
    geometry = dataclasses.replace(TINY, double_blocks=0, single_blocks=0)
    file = tmp_path / "embedders.safetensors"
    write_dense(file, geometry)
    with pytest.raises(PackError, match=r"embedders\.safetensors: has no packed layer"):
        open_transformer(file)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "config.json: is not JSON"),
        ("[" * 100_000, "config.json: is not JSON"),
        ("[1]", "config.json: holds a list. Expected a JSON object: download it again."),
        ('{"block_out_channels": 64}', "config.json: block_out_channels: is 64. Expected a list of positive whole"),
        ('{"block_out_channels": []}', "config.json: block_out_channels: is []"),
        ('{"block_out_channels": [64, 96]}', "config.json: block_out_channels: is [64, 96]"),
        (
            '{"block_out_channels": [32, 64], "latent_channels": "32"}',
            "config.json: latent_channels: is 32. Expected a",
        ),
        ('{"layers_per_block": true}', "config.json: layers_per_block: is True. Expected a positive whole number"),
        (
            '{"block_out_channels": [32, 32, 64, 96]}',
            "safetensors: has tensors that do not fit the sizes in vae/config",
        ),
    ],
)
def test_a_damaged_vae_config(tiny_vae: Path, comfyui_path: Path, content: str, found: str) -> None:
    from bonsai_ops.host.vae import load_vae

    (tiny_vae / "vae" / "config.json").write_text(content)
    with pytest.raises(PackError) as caught:
        load_vae(tiny_vae)
    assert found in str(caught.value) and str(tiny_vae) in str(caught.value)


@pytest.mark.parametrize("content", [None, "{}", '{"layers_per_block": 2}'])
def test_a_vae_config_that_is_missing(tiny_vae: Path, comfyui_path: Path, content: str | None) -> None:
    """The widths follow from the tensors: the same picture as with it."""
    from bonsai_ops.host.vae import load_vae

    latent = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = load_vae(tiny_vae).decode(latent)
    config = tiny_vae / "vae" / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    vae = load_vae(tiny_vae)
    assert torch.equal(vae.decode(latent), expected)
    assert (vae.latent_channels, vae.downscale_ratio) == (128, 16)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"decoder.conv_in.weight": torch.zeros(7, 32, 3, 3)}, "has tensors that do not fit one another"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(16, 3)}, "do not fit one another"),
        ({"encoder.down_blocks.1.resnets.0.conv1.weight": torch.zeros(33, 3)}, "block_out_channels: is [32, 33, "),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(0, 3)}, "block_out_channels: is [0, "),
    ],
)
def test_a_damaged_vae_without_config(
    tiny_vae: Path, comfyui_path: Path, change: dict[str, torch.Tensor], found: str
) -> None:
    from bonsai_ops.host.vae import load_vae

    path = tiny_vae / "vae" / MLX_FILE
    save_file(load_file(path) | change, path)
    (path.parent / "config.json").unlink()
    with pytest.raises(PackError) as caught:
        load_vae(tiny_vae)
    assert found in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"taesd_decoder.1.weight": torch.zeros(8)}, "taesd_decoder.1.weight: is torch.float32 [8], expected floats"),
        (
            {"taesd_decoder.1.weight": torch.zeros(8, 32, 3, 3, dtype=torch.uint8)},
            "taesd_decoder.1.weight: is torch.uint8 [8, 32, 3, 3], expected floats",
        ),
        ({"taesd_encoder.0.weight": torch.zeros(96, 3, 3, 3)}, "taesd_encoder.0.weight: is [96, 3, 3, 3], expected at"),
        ({"taesd_encoder.0.bias": torch.zeros(8, 1)}, "taesd_encoder.0.bias: is [8, 1], expected at most [64]"),
        ({"taesd_encoder.99.weight": torch.zeros(8)}, "taesd_encoder.99.weight: is no tensor of a tiny VAE"),
        ({}, "taesd_encoder.0.bias: is missing: only whole blocks may be"),
    ],
)
def test_a_damaged_tiny_vae(tmp_path: Path, comfyui_path: Path, change: dict[str, torch.Tensor], found: str) -> None:
    from bonsai_ops.host.vae import load_vae

    tensors = {"taesd_decoder.1.weight": torch.zeros(8, 32, 3, 3), "taesd_encoder.0.weight": torch.zeros(8, 3, 3, 3)}
    (tmp_path / "vae").mkdir()
    save_file(tensors | change, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(PackError) as caught:
        load_vae(tmp_path)
    assert found in str(caught.value) and str(tmp_path) in str(caught.value)
