"""`python -m bonsai_ops.convert SRC DST`: any pack's transformer or text encoder -> one native .safetensors.

ComfyUI's graph is not needed. A folder that has both is taken for its transformer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .tools.environment import ending_by_exception, relaunch_if_needed
from .weights.errors import PackError
from .weights.files import is_folder

if TYPE_CHECKING:
    from .weights.formats import Pack

BAR_WIDTH = 40


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit code: 0, or 1 with one sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m bonsai_ops.convert",
        description="Converts a Bonsai pack's transformer (MLX, gemlite, unpacked; a file or a folder), or its text "
        "encoder (its file or own folder), to one native .safetensors, which is used as it lies on the disk.",
    )
    parser.add_argument("source", type=Path, help="pack file or folder, or a text encoder's")
    parser.add_argument("target", type=Path, help="new .safetensors file (or a folder to put it in)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file that is not the source")
    parser.add_argument("--yes", action="store_true", help="download what this Python lacks without asking")
    arguments = parser.parse_args(argv)
    try:
        is_folder(arguments.source)
    except PackError as error:
        print(_without_page(error), file=sys.stderr)
        return 1
    relaunch_if_needed("bonsai_ops.convert", sys.argv[1:] if argv is None else argv, arguments.yes)
    started = time.perf_counter()
    try:
        with ending_by_exception():
            target = _convert(arguments.source, arguments.target, arguments.overwrite)
        size = target.stat().st_size
    except PackError as error:
        print(f"\n{_without_page(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        found, cure = f"cannot be used ({error.strerror or error})", "Choose another name or folder."
        print(f"\n{PackError(error.filename or arguments.target, found, cure)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        from .weights.device_errors import is_the_devices  # torch is there only after the relaunch

        if not is_the_devices(error):
            raise
        said = PackError(arguments.source, "memory ran out", "Close other programs and convert again.")
        print(f"\n{said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nCancelled; nothing was written.", file=sys.stderr)
        return 130
    print(f"{target}: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
    return 0


def _without_page(error: PackError) -> PackError:
    """The error with a cure for the command line, where its own is one for ComfyUI's page."""
    if error.cure.startswith("Load it with ") or "refresh the page" in error.cure:
        return PackError(error.path, error.found, "Give the transformer of a Bonsai pack, or its folder.", error.key)
    return error


def _convert(source: Path, target: Path, overwrite: bool) -> Path:
    """Packs `source` and writes `target`; returns the file written. Raises PackError or OSError."""
    from .weights.formats import native  # torch is there only after the relaunch
    from .weights.read import read_weights, source_record

    pack, architecture, check = _open(source)
    if target.is_dir():
        target = target / f"{source.stem if source.is_file() else source.name}-bonsai.safetensors"
    if target.suffix != ".safetensors":
        raise PackError(target, f"ends in {target.suffix!r}", "Choose a name that ends in .safetensors.")
    if target.exists() and target.samefile(pack.path):
        raise PackError(target, "is the file that is being read", "Choose another name.")
    if target.exists() and not overwrite:
        raise PackError(target, "exists", "Choose another name or say --overwrite.")
    weights = read_weights(pack, _bar("packing"))
    source = source_record(pack.path, pack.format, pack.source)
    record = native.make_record(weights, source, architecture, pack.configuration)
    native.write(target, weights, record, _bar("writing"), overwrite, check=check)
    return target


def _open(source: Path) -> tuple[Pack, str, Callable[[Pack], object]]:
    """(the transformer or the text encoder of `source`, its architecture in a record, what checks a file of it).

    A text encoder that has all its layers keeps them. Raises PackError.
    """
    from .weights.formats.native import TEXT_ENCODER
    from .weights.read import as_text_encoder, as_transformer, open_text_encoder, open_transformer

    try:
        pack = open_transformer(source)
    except PackError as error:
        try:
            pack, _ = open_text_encoder(source)
        except PackError:
            raise error from None
    else:
        return pack, pack.architecture, as_transformer
    whole = 0 < pack.counts["layers in all"] <= pack.counts["layers"]
    return open_text_encoder(source, whole=whole)[0], TEXT_ENCODER, as_text_encoder


def _bar(stage: str) -> Callable[[int, int], None]:
    """A progress bar (done, total) for a terminal, silent where standard error is none."""

    def report(done: int, total: int) -> None:
        if sys.stderr.isatty():
            filled = BAR_WIDTH * done // max(total, 1)
            print(
                f"\r{stage} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {100 * done // max(total, 1):3d} %",
                end="\n" if done >= total else "",
                file=sys.stderr,
                flush=True,
            )

    return report


if __name__ == "__main__":
    raise SystemExit(main())
