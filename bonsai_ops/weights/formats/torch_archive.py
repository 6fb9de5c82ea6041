"""The zip archive that torch.save writes, looked through before torch opens it.

    <name>/data.pkl    the pickle: torch_pickle.py
    <name>/data/<key>  the bytes of one storage, as they lie
    <name>/..          version, byteorder and the like

All members are stored as they are, each lies within the file, no two have one name or the same bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import PackError
from ..files import not_its_fault
from .file import MAX_TENSORS

ENCRYPTED = 1
"""Bit of a zip member's flags."""
MAX_PICKLE = 16 << 20
"""Bytes; that of a release has less than one MB."""
MAX_READ = MAX_PICKLE
"""Bytes of the archive's index, and of anything else that is read of it in one piece."""
MAX_MEMBERS = MAX_TENSORS + 64
ZIPPED_AGAIN = "torch stores its members as they are: use the file as it was published."
Refuse = Callable[..., PackError]
"""(found, cure, key) -> the error."""


class _Bounded(io.FileIO):
    """A file that hands over no piece longer than MAX_READ, whatever its index asks for."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        self._size = size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_READ:
            raise zipfile.BadZipFile(f"it asks for {wanted} bytes at once")
        return super().read(wanted)


def read_archive(path: Path, size: int, refuse: Refuse, download_again: str) -> tuple[bytes, Mapping[str, int]]:
    """(the pickle, {key: bytes of that storage}) of an archive of `size` bytes. Raises PackError; reads no storage."""
    try:
        with _Bounded(path, size) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if archive.comment or not 0 < len(members) <= MAX_MEMBERS or file.seek(0) or file.read(4) != b"PK\3\4":
                raise refuse(f"is no archive that torch wrote ({len(members)} members)", download_again)
            folder = members[0].filename.partition("/")[0]
            storages = _checked(members, folder, size, refuse, download_again)
            pickle = next((m for m in members if m.filename == f"{folder}/data.pkl"), None)
            if pickle is None:
                raise refuse(f"is not a readable torch file (it has no {folder}/data.pkl)", download_again)
            if pickle.file_size > MAX_PICKLE:
                found = f"has {pickle.file_size} bytes"
                raise refuse(found, f"Expected at most {MAX_PICKLE}. {download_again}", pickle.filename)
            return archive.read(pickle), storages
    except PackError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, RuntimeError) as error:
        found = f"is not a readable torch file ({str(error).rstrip('. ')})"
        raise not_its_fault(path, error) or refuse(found, download_again) from error


def _checked(
    members: list[zipfile.ZipInfo], folder: str, size: int, refuse: Refuse, download_again: str
) -> dict[str, int]:
    storages, known, held = {}, set(), 0
    for member in members:
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED:
            raise refuse("is compressed or encrypted: the file was zipped again", ZIPPED_AGAIN, name)
        held += member.file_size
        if member.compress_size != member.file_size or member.header_offset + member.file_size > size or held > size:
            raise refuse(f"has {member.file_size} bytes, more than the file has room for", download_again, name)
        if name.lower() in known:  # torch looks a member up whatever its letters' case
            raise refuse("is there twice", ZIPPED_AGAIN, name)
        if not name.startswith(f"{folder}/") or (name.endswith(".pkl") and name != f"{folder}/data.pkl"):
            raise refuse("is not a readable torch file: this is no member of one", download_again, name)
        known.add(name.lower())
        storages[name.removeprefix(f"{folder}/data/")] = member.file_size
    return storages
