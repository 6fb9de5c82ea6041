"""Size, load time and peak memory of 4B packs in the real host.

Every row is one process of its own that loads one file through ComfyUI, so that peak memory belongs to that file. The
packs are synthetic: random codes, the real shapes. Rivals in the same run: a dense bf16 file through ComfyUI's own
loader, and the sizes of the published MLX and gemlite files.
"""

from __future__ import annotations

from pathlib import Path

from . import session

VARIANTS = ("ternary", "binary")
PUBLISHED_BYTES = {
    "ternary": {"mlx file": 1_425_271_472, "gemlite file": 1_540_457_482},
    "binary": {"mlx tensors": 965_164_032, "gemlite tensors": 1_080_179_712},
}
"""Sizes of the published files; binary: the sum of their tensors, the files' own sizes are not known."""


def measure(comfyui: Path, folder: Path, *, dense: bool = True) -> dict:
    """Writes the packs into `folder`, loads each in its own process, prints the table; returns the figures.

    Sizes in bytes, times in seconds. peak_rss_bytes is the process's, idle_rss_bytes that of a ComfyUI that has loaded
    nothing.
    """
    from ...weights.formats import native
    from ...weights.read import open_transformer, read_weights
    from .. import synthetic

    idle = _load(comfyui, "idle", Path())
    figures: dict = {"idle_rss_bytes": idle["peak_rss_bytes"]}
    print(f"ComfyUI with nothing loaded: {_mb(idle['peak_rss_bytes'])} peak", flush=True)
    for variant in VARIANTS:
        source, file = folder / variant / "mlx.safetensors", folder / variant / "native.safetensors"
        if not source.is_file():
            synthetic.write_mlx(source, variant)
        repacked = _load(comfyui, "bonsai", source)
        if not file.is_file():
            weights = read_weights(open_transformer(source))
            native.write(file, weights, native.make_record(weights))
            del weights
        loaded = _load(comfyui, "bonsai", file)
        figures[variant] = {
            **loaded,
            "file_bytes": file.stat().st_size,
            "repack_seconds": repacked["load_seconds"],
            "repack_peak_rss_bytes": repacked["peak_rss_bytes"],
        }
        _print_variant(variant, figures[variant], source.stat().st_size)
    if dense:
        file = folder / "dense.safetensors"
        if not file.is_file():
            synthetic.write_dense(file)
        figures["dense_bf16"] = _load(comfyui, "stock", file)
        print(
            f"dense bf16, stock ComfyUI: file {_mb(file.stat().st_size)}, resident "
            f"{_mb(figures['dense_bf16']['resident_bytes'])}, load {figures['dense_bf16']['load_seconds']:.1f} s, "
            f"peak {_mb(figures['dense_bf16']['peak_rss_bytes'])}",
            flush=True,
        )
    return figures


def _print_variant(variant: str, row: dict, mlx_bytes: int) -> None:
    published = ", ".join(f"{name} {_mb(size)}" for name, size in PUBLISHED_BYTES[variant].items())
    print(
        f"{variant}: resident {_mb(row['resident_bytes'])}, native file {_mb(row['file_bytes'])}, load "
        f"{row['load_seconds']:.1f} s, peak {_mb(row['peak_rss_bytes'])}, of it the file's pages that were read"
    )
    print(
        f"  from the MLX file ({_mb(mlx_bytes)}): repack and load {row['repack_seconds']:.1f} s, peak "
        f"{_mb(row['repack_peak_rss_bytes'])}; published: {published}",
        flush=True,
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _load(comfyui: Path, kind: str, file: Path) -> dict:
    """Loads one file in a fresh process; its figures."""
    return session.run("load", f"loading {file}", comfyui=comfyui, kind=kind, file=file)
