"""The native file: exact round trips, mapped loading, records that must agree, and writing that is all or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bonsai_ops.weights import codec
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import Pack, native, open_pack
from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight
from bonsai_ops.weights.read import read_weights

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
RADIX = {"bit": 2, "crumb": 4, "trit5": 3, "nibble": 16, "byte": 256}
"""Of a codec; a ternary weight has codes below 3 in any."""
SOURCE = {"file": "state_dict.pt", "sha256": "00ff"}


def packed(
    scheme: str, name: str, rows: int = 137, columns: int = 256, group: int = 64, dtype: torch.dtype = torch.bfloat16
) -> PackedWeight:
    generator = torch.Generator().manual_seed(rows)
    radix = 3 if scheme == "ternary" else RADIX[name]
    codes = torch.randint(0, radix, (rows, columns), dtype=torch.uint8, generator=generator)
    tables = [torch.randn(rows, columns // group, generator=generator).to(dtype) for _ in range(2)]
    zero = tables[1] if scheme in ("affine", "zero_point") else None
    return PackedWeight(codec.encode(name, codes), tables[0], (rows, columns), scheme, name, group, zero)


def write(path: Path, weights: Mapping[str, PackedWeight | torch.Tensor], **options: object) -> None:
    native.write(path, weights, native.make_record(weights, SOURCE), **options)


def read(path: Path) -> dict[str, PackedWeight | torch.Tensor]:
    return {name: entry.weight() for name, entry in open_pack(path).entries.items()}


def same(a: PackedWeight | torch.Tensor, b: PackedWeight | torch.Tensor) -> bool:
    """Equal to the bit, dtypes and description included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
    names = ("codes", "scale", "zero", "up", "down")
    tables = [(getattr(a, name), getattr(b, name)) for name in names]
    told = [(w.shape, w.scheme, w.codec, w.group_size, [getattr(w, n) is None for n in names]) for w in (a, b)]
    return told[0] == told[1] and all(same(x, y) for x, y in tables if x is not None)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
@pytest.mark.parametrize("rows", [1, 137])
def test_packed_weights_round_trip(tmp_path: Path, rows: int, scheme: str, name: str, dtype: torch.dtype) -> None:
    weight = packed(scheme, name, rows, dtype=dtype)
    write(tmp_path / "w.safetensors", {"a.b.weight": weight})
    found = read(tmp_path / "w.safetensors")
    assert found.keys() == {"a.b.weight"} and same(found["a.b.weight"], weight)


@pytest.mark.parametrize(
    "dtype",
    [*FLOATS, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 7)], ids=str)
def test_dense_tensors_round_trip(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape) * 5).to(dtype)
    write(tmp_path / "w.safetensors", {"layer.weight": packed("ternary", "trit5"), "norm.scale": tensor})
    assert same(read(tmp_path / "w.safetensors")["norm.scale"], tensor)


def test_other_views_of_memory_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.randn(8, 6)
    views = {
        "t": whole.t(),
        "step": whole[::2],
        "parameter": torch.nn.Parameter(whole),
        "expanded": whole[:1].expand(5, 6),
    }
    write(tmp_path / "w.safetensors", {"layer.weight": packed("binary", "bit"), **views})
    found = read(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())


def mixed() -> dict[str, PackedWeight | torch.Tensor]:
    """Every scheme beside dense tensors of every item size, with odd lengths."""
    weights: dict[str, PackedWeight | torch.Tensor] = {
        f"{scheme}.{name}.weight": packed(scheme, name, 41, 96, 32, dtype)
        for (scheme, name), dtype in zip(PAIRS, [*FLOATS, *FLOATS], strict=False)
    }
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        weights[f"dense.{dtype}"] = torch.ones(7, dtype=dtype)
    return weights


def test_the_standard_reader_reads_it(tmp_path: Path) -> None:
    """safetensors' own loader, and the record as plain JSON with the documented fields."""
    path, weights = tmp_path / "w.safetensors", mixed()
    write(path, weights, extra={"workflow": "{}"})
    assert load_file(path).keys() == native.to_tensors(weights).keys()
    assert all(same(load_file(path)[name], tensor) for name, tensor in native.to_tensors(weights).items())
    metadata = SafetensorsFile(path).metadata
    assert metadata["format"] == "pt" and metadata["workflow"] == "{}"
    record = json.loads(metadata["bonsai"])
    assert record.keys() == {"version", "variant", "architecture", "packer", "source", "layers"}
    assert (record["version"], record["variant"], record["architecture"], record["source"]) == (
        1,
        "mixed",
        "flux2",
        SOURCE,
    )
    assert record["packer"].startswith("bonsai-image ")
    assert record["layers"]["ternary.trit5"] == {
        "scheme": "ternary",
        "codec": "trit5",
        "group_size": 32,
        "shape": [41, 96],
    }
    assert open_pack(path).format == "native" and open_pack(path).source == SOURCE


@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_the_variant_is_the_scheme_of_all_layers(scheme: str, name: str) -> None:
    assert native.make_record({"a.weight": packed(scheme, name), "b": torch.ones(1)}).variant == scheme


def test_tensor_data_is_aligned(tmp_path: Path) -> None:
    """The data starts at a multiple of 64 bytes and every tensor at a multiple of its item size, without gaps."""
    path = tmp_path / "w.safetensors"
    write(path, mixed())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    sizes = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    offsets = [(*entry["data_offsets"], sizes[entry["dtype"]]) for entry in header.values()]
    assert all(begin % size == 0 for begin, _, size in offsets)
    ends = [0, *sorted(end for _, end, _ in offsets)]
    assert sorted(begin for begin, _, _ in offsets) == ends[:-1] and 8 + length + ends[-1] == len(content)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from Linux's /proc")
def test_loading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    """Every loaded byte lies in a mapping of the file; a tensor in ordinary memory shows that the test can fail."""
    path = tmp_path / "w.safetensors"
    write(path, {"layer.weight": packed("ternary", "trit5", 700, 4096, 128), "dense": torch.randn(64, 4096)})

    def is_mapped(tensor: torch.Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(address, 16) for address in line.split()[0].split("-"))
            if low <= begin and end <= high:
                return line.endswith(str(path))
        return False

    first, second = read(path), read(path)
    for found in (first, second):
        assert is_mapped(found["layer.weight"].codes) and is_mapped(found["layer.weight"].scale)
        assert is_mapped(found["dense"])
    assert not is_mapped(first["dense"].clone())


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"layer.weight": packed("binary", "bit"), "dense": torch.ones(64)})
    before = path.read_bytes()
    read(path)["dense"].fill_(3)
    assert path.read_bytes() == before


@pytest.mark.parametrize("rows", [128, 137, 256, 3072, 9216])
@pytest.mark.parametrize(("scheme", "name"), [p for p in PAIRS if p[0] != "zero_point"])
def test_a_file_without_a_record_is_guessed(tmp_path: Path, scheme: str, name: str, rows: int) -> None:
    """As ComfyUI's own ModelSave writes it, for layers of 128 rows and more."""
    weight = packed(scheme, name, rows, 128, 128)
    tensors = {f"model.diffusion_model.{n}": t for n, t in native.to_tensors({"a.weight": weight}).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    assert open_pack(tmp_path / "w.safetensors").source == {}
    assert same(read(tmp_path / "w.safetensors")["model.diffusion_model.a.weight"], weight)


def test_what_cannot_be_guessed_is_refused(tmp_path: Path) -> None:
    """Eight rows take eight byte rows in every codec."""
    path = tmp_path / "w.safetensors"
    save_file(native.to_tensors({"a.weight": packed("ternary", "trit5", 8)}), path)
    with pytest.raises(
        PackError, match=r"a\.weight: has 8 byte rows for 8 rows, which fits 2 codecs\. .*Save Bonsai Model"
    ):
        open_pack(path)


def damaged(path: Path, change: dict | None = None, layer: dict | None = None, **tensors: torch.Tensor | None) -> Path:
    """A file of one affine layer `a` whose record or tensors were changed; a tensor given as None is left out."""
    weights = {"a.weight": packed("affine", "crumb"), "norm.scale": torch.ones(3)}
    record = vars(native.make_record(weights))
    record["layers"]["a"].update(layer or {})
    record.update(change or {})
    state = {**native.to_tensors(weights), **{n.replace("__", "."): t for n, t in tensors.items()}}
    save_file({n: t for n, t in state.items() if t is not None}, path, {"bonsai": json.dumps(record)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change": {"version": 3}}, r"bonsai: is version 3 of the native format, this plugin reads up to 2\. Update"),
        ({"change": {"version": "x"}}, r"bonsai: has a damaged record"),
        ({"change": {"layers": 3}}, r"bonsai: has a damaged record"),
        ({"change": {"layers": [[0.5, {}]]}}, r"bonsai: has a damaged record"),
        ({"change": {"source": [[0.5, ""]]}}, r"bonsai: has a damaged record"),
        ({"change": {"source": "file"}}, r"bonsai: has a damaged record"),
        (
            {"layer": {"shape": [136, 256]}},
            r"a\.weight: is \(137, 256\) in groups of 64 by its tensors, but affine crumb ",
        ),
        ({"layer": {"group_size": 128}}, r"a\.weight: is .* in groups of 64 .* in groups of 128 by the record"),
        ({"layer": {"codec": "trit5"}}, r"a\.weight: .* but affine trit5"),
        (
            {"layer": {"codec": "nibble"}},
            r"a\.weight: has 40 byte rows with a zero table\. Expected 72 for affine nibble",
        ),
        ({"layer": {"codec": "trit6"}}, r"a\.weight: .* but affine trit6"),
        ({"layer": {"scheme": ["affine"]}}, r"a\.weight: .* but \['affine'\] crumb"),
        ({"layer": {"scheme": "ternary", "codec": "trit5"}}, r"a\.weight: has 40 byte rows with a zero table"),
        ({"layer": {"shape": None}}, r"a\.weight: is described by"),
        ({"change": {"layers": {"a": "affine"}}}, r"a\.weight: is described by 'affine'"),
        ({"change": {"layers": {"gone": {}}}}, r"gone\.weight: is missing\. The file's record describes it"),
        ({"a__weight": None}, r"a\.weight_(scale|zero): stands alone\. Expected the codes a\.weight"),
        ({"a__weight": torch.zeros(40, 256)}, r"a\.weight: is torch\.float32 \[40, 256\]\. Expected u8 codes \[n, K\]"),
        ({"a__weight": torch.zeros(39, 256, dtype=torch.uint8)}, r"a\.weight: has 39 byte rows .*Expected 40"),
        ({"a__weight_scale": torch.ones(137, 3)}, r"a\.weight_scale: is torch\.float32 \[137, 3\]\. Expected bf16"),
        ({"a__weight_scale": torch.ones(137, 4, dtype=torch.int32)}, r"a\.weight_scale: is torch\.int32"),
        ({"a__weight_zero": None}, r"a\.weight: has 40 byte rows without a zero table\. Expected 40 for affine crumb"),
        (
            {"a__weight_zero": torch.ones(137, 2)},
            r"a\.weight_zero: is torch\.float32 \[137, 2\]\. Expected .*\[137, 4\]",
        ),
        ({"a__weight_zero": torch.ones(137, 4, dtype=torch.int8)}, r"a\.weight_zero: is torch\.int8"),
    ],
)
def test_record_and_tensors_must_agree(tmp_path: Path, change: dict, message: str) -> None:
    """Seen when the file is opened, before anything is loaded."""
    path = damaged(tmp_path / "w.safetensors", **change)
    with pytest.raises(PackError, match=rf"w\.safetensors: {message}"):
        open_pack(path)


@pytest.mark.parametrize("record", ["", "null", "[]", "{", '{"version": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(native.to_tensors({"a.weight": packed("binary", "bit")}), path, {"bonsai": record})
    with pytest.raises(PackError, match=r"w\.safetensors: bonsai: has a damaged record .*\. Download the file again"):
        open_pack(path)


@pytest.mark.parametrize("density", ["compact", "fast"])
@pytest.mark.parametrize(
    ("name", "byte"), [("crumb", 0b00011000 | 0b11), ("crumb", 0xFF), ("trit5", 1), ("trit5", 237)]
)
@pytest.mark.parametrize("has_record", [True, False])
def test_bytes_that_are_no_codes_are_refused(
    tmp_path: Path, has_record: bool, name: str, byte: int, density: str
) -> None:
    """Code 3 of a ternary weight was drawn where nothing had to be repacked."""
    weight = packed("ternary", name)
    weight.codes[5, 7] = byte
    tensors = native.to_tensors({"a.weight": weight})
    record = {"bonsai": native.make_record({"a.weight": weight}).to_json()} if has_record else None
    save_file(tensors, tmp_path / "w.safetensors", record)
    with pytest.raises(PackError, match=rf"a\.weight: holds bytes that are no codes of a ternary {name} weight\. Down"):
        read_weights(open_pack(tmp_path / "w.safetensors"), density=density)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("table", ["scale", "zero", "up", "down", "dense"])
def test_tables_that_are_not_finite_are_refused(tmp_path: Path, table: str, bad: float) -> None:
    weight, dense = with_residual(packed("affine", "nibble")), torch.ones(3, 5).bfloat16()
    (dense if table == "dense" else getattr(weight, table))[2, 1] = bad
    write(tmp_path / "w.safetensors", {"a.weight": weight, "b.weight": dense})
    found = r"b\.weight: holds" if table == "dense" else rf"a\.weight: the {table} table holds"
    with pytest.raises(PackError, match=rf"{found} a value that is not finite\. Download"):
        read_weights(open_pack(tmp_path / "w.safetensors"))


def test_a_mask_of_infinities_belongs_to_a_model(tmp_path: Path) -> None:
    """A buffer of another architecture, saved with it; and no value at all, or none that could be infinite."""
    weights = {"a.weight": packed("ternary", "trit5"), "mask": torch.full((2, 2), float("-inf"))}
    weights |= {
        "none.weight": torch.empty(0, 3),
        "steps": torch.tensor(3),
        "b.weight": torch.ones(3).to(torch.float8_e5m2),
    }
    native.write(tmp_path / "w.safetensors", weights, native.make_record(weights, SOURCE, "SD3", {"class": "SD3"}))
    assert read_weights(open_pack(tmp_path / "w.safetensors")).keys() == weights.keys()


@pytest.mark.parametrize("left", [0, 1, 9, 100, -1, -5000])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "w.safetensors"
    write(path, {"a.weight": packed("ternary", "trit5"), "dense": torch.ones(4096)})
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(PackError, match=r"w\.safetensors: "):
        open_pack(path)


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(PackError, match=r"w\.safetensors: exists\. Choose another name"):
        write(path, mixed())
    assert path.read_bytes() == b"mine" and leftovers(tmp_path) == ["w.safetensors"]
    write(path, mixed(), overwrite=True)
    assert read(path).keys() == mixed().keys() and leftovers(tmp_path) == ["w.safetensors"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(PackError, match="appeared while this file was written"):
        write(path, mixed(), progress=lambda done, total: path.write_bytes(b"other"))
    assert path.read_bytes() == b"other" and leftovers(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize(
    "value",
    ["text", {"a": [1, None]}, 3, None, Path("folder"), "\ud800"],
    ids=["text", "dict", "3", "None", "Path", "half"],
)
@pytest.mark.parametrize("name", ["bonsai", "format", "note", "\udfff"], ids=ascii)
def test_foreign_metadata_never_replaces_the_record(tmp_path: Path, name: str, value: object) -> None:
    """Such a file was written and could never be loaded."""
    path, weights = tmp_path / "w.safetensors", {"a.weight": packed("ternary", "trit5")}
    write(path, weights, extra={name: value, "workflow": "{}"})
    assert same(read(path)["a.weight"], weights["a.weight"])
    metadata = SafetensorsFile(path).metadata
    assert metadata["format"] == "pt" and metadata["workflow"] == "{}" and len(metadata) == 4
    (foreign,) = [text for key, text in metadata.items() if key not in ("format", "bonsai", "workflow")]
    assert foreign == {"text": "text", "\ud800": "\\ud800"}.get(value if isinstance(value, str) else "", foreign)
    assert name not in ("bonsai", "format") or metadata[f"{name}_"] == foreign


def test_what_could_not_be_read_again_gets_no_name(tmp_path: Path) -> None:
    weights = {"a.weight": packed("ternary", "trit5")}
    (tmp_path / "w.safetensors").write_bytes(b"mine")
    for extra in ({}, {"b.weight_scale": torch.ones(3)}):
        record = native.make_record({} if extra else {"gone.weight": weights["a.weight"]})
        with pytest.raises(PackError, match=r"w\.safetensors: was not written, for it could not be read again \("):
            native.write(tmp_path / "w.safetensors", weights | extra, record, overwrite=True)
    assert leftovers(tmp_path) == ["w.safetensors"] and (tmp_path / "w.safetensors").read_bytes() == b"mine"


def test_a_loaded_file_may_be_replaced_by_its_own_weights(tmp_path: Path) -> None:
    """The mapping stays valid while the new file is written beside the old one."""
    path, weights = tmp_path / "w.safetensors", mixed()
    write(path, weights)
    write(path, read(path), overwrite=True)
    assert all(same(found, weights[name]) for name, found in read(path).items())


def test_missing_folders_are_made_and_the_file_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "w.safetensors"
    write(path, mixed())
    assert path.stat().st_mode & 0o777 == 0o644 or os.name == "nt"


def test_progress_reaches_the_size(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write(tmp_path / "w.safetensors", mixed(), progress=lambda done, total: seen.append((done, total)))
    size = sum(t.nbytes for t in native.to_tensors(mixed()).values())
    assert seen[-1] == (size, size) and {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("error", [RuntimeError("cancelled"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_a_cancel_leaves_nothing_behind(tmp_path: Path, error: BaseException, existing: bool) -> None:
    path = tmp_path / "w.safetensors"
    if existing:
        path.write_bytes(b"mine")
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if done * 2 > total:
            raise error

    with pytest.raises(type(error)):
        write(path, mixed(), progress=progress, overwrite=existing)
    assert calls > 1
    assert leftovers(tmp_path) == (["w.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"mine"


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path) -> None:
    """The system itself refuses to write beyond 64 KiB, in the way it does when the disk is full: with an OSError."""
    resource = pytest.importorskip("resource")
    weights = {"a.weight": packed("ternary", "trit5"), "dense": torch.ones(1 << 16)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(PackError, match=r"needs 0\.3 MB, and there is no room for it \(File too large\)"):
            write(tmp_path / "w.safetensors", weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
    write(tmp_path / "w.safetensors", weights)
    assert leftovers(tmp_path) == ["w.safetensors"]


def with_residual(weight: PackedWeight, rank: int = 3) -> PackedWeight:
    rows, columns = weight.shape
    return replace(weight, up=torch.randn(rows, rank).bfloat16(), down=torch.randn(rank, columns).bfloat16())


def test_a_low_rank_residual_round_trips(tmp_path: Path) -> None:
    """Version 2, with "rank" for the layers that have one; group size and scheme from layer to layer."""
    weights = {
        "a.weight": with_residual(packed("ternary", "trit5")),
        "b.weight": packed("binary", "bit", group=128),
        "c.weight": with_residual(packed("affine", "nibble", group=32), 1),
    }
    write(tmp_path / "w.safetensors", weights)
    found = read(tmp_path / "w.safetensors")
    assert found.keys() == weights.keys() and all(same(found[name], weight) for name, weight in weights.items())
    record = json.loads(SafetensorsFile(tmp_path / "w.safetensors").metadata["bonsai"])
    assert record["version"] == 2
    assert [record["layers"][layer].get("rank") for layer in "abc"] == [3, None, 1]
    save_file(native.to_tensors({"a.weight": weights["a.weight"]}), tmp_path / "plain.safetensors")
    assert same(read(tmp_path / "plain.safetensors")["a.weight"], weights["a.weight"])


def test_eight_bit_codes_need_version_2(tmp_path: Path) -> None:
    """A reader of version 1 says "update" instead of misreading them; without a record they are recognised too."""
    weights = {"a.weight": packed("affine", "byte", group=128), "b.weight": packed("affine", "nibble")}
    write(tmp_path / "w.safetensors", weights)
    assert native.read_records(SafetensorsFile(tmp_path / "w.safetensors"))[""].version == 2
    assert all(same(read(tmp_path / "w.safetensors")[name], weight) for name, weight in weights.items())
    save_file(native.to_tensors(weights), tmp_path / "plain.safetensors")
    assert same(read(tmp_path / "plain.safetensors")["a.weight"], weights["a.weight"])
    assert native.make_record({"b.weight": weights["b.weight"]}).version == 1


def test_another_architecture_is_recorded(tmp_path: Path) -> None:
    model = {"class": "SD3", "model_type": "FLOW", "unet_config": {"depth": 2}, "sampling_settings": {}}
    weights = {"x.weight": packed("ternary", "trit5")}
    native.write(tmp_path / "w.safetensors", weights, native.make_record(weights, SOURCE, "SD3", model))
    pack = open_pack(tmp_path / "w.safetensors")
    assert (pack.architecture, pack.configuration) == ("SD3", model)
    record = native.read_records(SafetensorsFile(tmp_path / "w.safetensors"))[""]
    assert record.version == 2 and record.layers.keys() == {"x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_down": None}, r"a\.weight_down: is missing\. Expected bf16, fp16 or fp32 \[3, 256\], a low-rank"),
        ({"a.weight_up": None}, r"a\.weight_up: is missing"),
        ({"a.weight_up": torch.zeros(137, 4)}, r"a\.weight_up: is torch.float32 \[137, 4\]"),
        ({"a.weight_down": torch.zeros(3, 99)}, r"a\.weight_down: is torch.float32 \[3, 99\]"),
        ({"a.weight_up": torch.zeros(137, 3, dtype=torch.uint8)}, r"a\.weight_up: is torch.uint8"),
        ({"z.weight_up": torch.zeros(3, 3)}, r"z\.weight_up: stands alone"),
    ],
)
def test_a_broken_residual_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    weights = {"a.weight": with_residual(packed("ternary", "trit5"))}
    tensors = {n: t for n, t in (native.to_tensors(weights) | change).items() if t is not None}
    save_file(tensors, tmp_path / "w.safetensors", {"bonsai": native.make_record(weights).to_json()})
    with pytest.raises(PackError, match=message):
        open_pack(tmp_path / "w.safetensors")


def saved_by_comfyui(path: Path, parts: Mapping[str, Mapping], metadata: Mapping[str, str] | None = None) -> Path:
    """A file of {prefix: weights} as ComfyUI's own nodes save them: each with its record in a tensor."""
    tensors = {}
    for prefix, weights in parts.items():
        architecture = "qwen3" if "text" in prefix else "flux2"
        record = native.make_record(weights, SOURCE, architecture).to_tensor()
        tensors |= {prefix + name: t for name, t in {**native.to_tensors(weights), "bonsai.record": record}.items()}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("metadata", [None, {"bonsai": '{"a": 1}', "format": "webp"}, {"bonsai": "null"}], ids=str)
def test_a_record_in_a_tensor(tmp_path: Path, metadata: dict | None) -> None:
    """What a workflow wrote under our name in the metadata does not count then; eight rows fit two codecs."""
    weights = {"a.weight": packed("ternary", "trit5", 8), "b.weight": torch.ones(3)}
    path = saved_by_comfyui(tmp_path / "w.safetensors", {"model.diffusion_model.": weights}, metadata)
    pack = open_pack(path)
    assert (pack.format, pack.source, pack.recorded, pack.prefix) == ("native", SOURCE, True, "model.diffusion_model.")
    found = read(path)
    assert found.keys() == {f"model.diffusion_model.{name}" for name in weights}
    assert same(found["model.diffusion_model.a.weight"], weights["a.weight"])


def test_a_dense_file_of_a_workflow_with_our_name(tmp_path: Path) -> None:
    """What ComfyUI saves of a merge, say: no damaged file of ours."""
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "w.safetensors", {"bonsai": '{"a": 1}'})
    assert open_pack(tmp_path / "w.safetensors").format == "unpacked"


def test_a_checkpoint_of_several_parts(tmp_path: Path) -> None:
    """Each record describes the layers of its prefix; quantized layers of others are left alone."""
    parts = {
        "model.diffusion_model.": {"a.weight": packed("ternary", "trit5", 8)},
        "text_encoders.": {"a.weight": packed("zero_point", "nibble")},
    }
    path = saved_by_comfyui(tmp_path / "w.safetensors", parts)
    other = {"other.a.weight": torch.zeros(8, 16, dtype=torch.uint8), "other.a.weight_scale": torch.ones(3)}
    save_file(load_file(path) | other, path)
    found = read(path)
    for prefix, weights in parts.items():
        assert same(found[f"{prefix}a.weight"], weights["a.weight"])
    assert all(torch.equal(found[name], tensor) for name, tensor in other.items())
    assert open_pack(path).architecture == "flux2"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (torch.zeros(3), r"is torch\.float32 \[3\]\. Expected u8"),
        (torch.zeros(2, 2, dtype=torch.uint8), r"is torch\.uint8 \[2, 2\]\. Expected u8"),
        (torch.zeros(0, dtype=torch.uint8), "has a damaged record"),
        (torch.full((9,), 0xFF, dtype=torch.uint8), "has a damaged record"),
        (torch.frombuffer(bytearray(b'{"version": 99}'), dtype=torch.uint8), "is version 99 of the native format"),
    ],
    ids=["dtype", "shape", "empty", "bytes", "newer"],
)
def test_a_damaged_record_in_a_tensor(tmp_path: Path, record: torch.Tensor, message: str) -> None:
    tensors = native.to_tensors({"x.a.weight": packed("ternary", "trit5")})
    save_file(tensors | {"x.bonsai.record": record}, tmp_path / "w.safetensors")
    with pytest.raises(PackError, match=rf"x\.bonsai\.record: {message}"):
        open_pack(tmp_path / "w.safetensors")


def test_what_a_loader_would_refuse_gets_no_name(tmp_path: Path) -> None:
    def refuse(pack: Pack) -> None:
        raise PackError(pack.path, "is no good", "None.")

    with pytest.raises(PackError, match=r"w\.safetensors: was not written, for it could not be read again \(is no goo"):
        write(tmp_path / "w.safetensors", mixed(), check=refuse)
    assert leftovers(tmp_path) == []
