"""What lies in the place of a model after a download that went wrong: a Git LFS pointer, a web page, an answer."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import PackError
from .files import is_file

HEAD = 4096
"""Bytes that are looked at. No container that is read here begins with as much text."""
MAGICS = (b"GGUF", b"PK")
"""What the containers begin with whose beginning is text: the reader tells where such a file ends."""
WORDS = 80
"""Characters of a text that the message shows."""
POINTER = re.compile(r"version https?://\S+/spec/v\d\s.*?^oid sha256:\w+\s", re.DOTALL | re.MULTILINE)
SIZE = re.compile(r"^size (\d+)\s*$", re.MULTILINE)
TAG = re.compile(r"<(!doctype html|html|head|body|script|meta)\b")
PAGE_CURE = (
    "Download the file itself: with the download button of its page, or the address with /resolve/ in the place of "
    "/blob/; log in first where the page asks for that."
)


def refuse_stand_ins(path: Path) -> None:
    """Raises PackError for a file that only stands in for a model. Anything else, and nothing, is for the reader."""
    if not is_file(path):
        return
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return
    text = None if head.startswith(MAGICS) else _text(head)
    if text is None:
        return
    if POINTER.match(text):
        size = SIZE.search(text)
        meant = f" of {size[1]} bytes" if size else ""
        raise PackError(
            path,
            f"is a Git LFS pointer, not the file{meant} that it stands for",
            'Run "git lfs pull" in the downloaded repository, or download the file from its page.',
        )
    marked = text.lstrip().startswith("<")
    if marked and TAG.search(text.lower()):
        raise PackError(path, "is a saved web page, not a model", PAGE_CURE)
    if marked or len(head) < HEAD:
        said = " ".join(text.split())[:WORDS]
        raise PackError(path, f"is a text, not a model: {said!r}", PAGE_CURE)


def _text(head: bytes) -> str | None:
    """The beginning of a file as text; None for one that has bytes no text has, or nothing."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, "replace")
    if not text.strip() or any(character < " " and character not in "\t\n\f\r" for character in text):
        return None
    in_another_encoding = text.count("\ufffd") > 4
    return None if in_another_encoding and not text.lstrip().startswith("<") else text
