"""What people find in the place of a download that went wrong is called by its name, whatever the file is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import FORMATS, open_pack
from bonsai_ops.weights.stand_in import HEAD, refuse_stand_ins

SUFFIXES = sorted({suffix for form in FORMATS for suffix in form.FILE.SUFFIXES})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:b21737bdf02690b7\nsize 1425271472\n"
PAGE = b"<!DOCTYPE html><html>Please log in</html>"
POINTERS = {
    "plain": LFS,
    "windows": LFS.replace(b"\n", b"\r\n"),
    "old": LFS.replace(b"git-lfs.github.com", b"hawser.github.com"),
    "extended": LFS.replace(b"\noid", b"\next-0-zip sha256:00\noid"),
}
PAGES = {
    "short": PAGE,
    "long": PAGE * 500,
    "small letters": b"\n\n  <!doctype HTML>\n<html lang='en'>",
    "no doctype": b"<html><head><title>x</title>",
    "comment": b"<!-- saved from url=(0014)about:internet -->\r\n<html>",
    "xhtml": b"<?xml version='1.0' encoding='utf-8'?>\n<!DOCTYPE html PUBLIC '-//W3C//DTD XHTML'>",
    "mark": b"\xef\xbb\xbf" + PAGE,
    "utf-16": PAGE.decode().encode("utf-16"),
    "another encoding": b"<html><title>" + bytes(range(0xA1, 0xFF)) * 9,
}
ANSWERS = {
    "words": b"Entry not found",
    "json": b'{"error": "Access to model x is restricted"}',
    "xml": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>" + b" " * 5000,
}
OTHERS = {
    "empty": b"",
    "blank": b" \n" * 9,
    "safetensors": (2).to_bytes(8, "little") + b"{}",
    "zip": b"PK\x03\x04" + bytes(30),
    "beginning of gguf": b"GGUF",
    "beginning of zip": b"PK",
    "gguf": b"GGUF\x03\0\0\0" + bytes(16),
    "text with a zero": b"<html>\0",
    "long text": b"a" * (2 * HEAD),
}


def refused(folder: Path, content: bytes, suffix: str) -> str:
    path = folder / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(PackError) as caught:
        open_pack(path)
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", POINTERS)
def test_a_pointer_of_git_lfs(tmp_path: Path, kind: str, suffix: str) -> None:
    message = refused(tmp_path, POINTERS[kind], suffix)
    assert "is a Git LFS pointer, not the file of 1425271472 bytes" in message and "git lfs pull" in message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", PAGES)
def test_a_saved_web_page(tmp_path: Path, kind: str, suffix: str) -> None:
    message = refused(tmp_path, PAGES[kind], suffix)
    assert "is a saved web page" in message and "/resolve/" in message


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_a_server_answered(tmp_path: Path, kind: str) -> None:
    message = refused(tmp_path, ANSWERS[kind], ".safetensors")
    assert "is a text, not a model" in message and "\n" not in message and len(message) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_else_is_for_the_reader(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(OTHERS[kind])
    refuse_stand_ins(path)


def test_nothing_and_folders_are_for_the_reader(tmp_path: Path) -> None:
    refuse_stand_ins(tmp_path)
    refuse_stand_ins(tmp_path / "missing")
