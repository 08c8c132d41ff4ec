"""Files in folders and tar archives, packed or not, as bytes and as text; and the split that a name tells."""

from __future__ import annotations

import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ..errors import UserError

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)  # by what unpacks


def split_of(path: Path) -> str | None:
    """The split that a file's name tells: ptb.valid.txt -> valid, val.de.gz -> valid, notes.txt -> None."""
    words = re.findall(r"[a-z]+", path.name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def read_text(path: Path) -> str:
    """A UTF-8 file's text, newlines as \\n, without a byte-order mark."""
    return decode_text(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """What the file at `path` holds, unpacked if its name ends in .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def decode_text(raw: bytes, name: str, offset: int = 0) -> str:
    """The text of UTF-8 bytes; raises UserError with the place of what is not. `offset`: bytes before these."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f"line {raw.count(bytes([10]), 0, error.start) + 1}" + (" of a later part" if offset else "")
        raise UserError(
            f"{name}: not UTF-8 at byte {offset + error.start} ({line}): convert it with iconv -t UTF-8"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def folder_files(folder: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield PurePosixPath(path.relative_to(folder).as_posix()), lambda p=path: read_bytes(p)  # type: ignore[misc]


def archive_files(path: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield PurePosixPath(member.name), lambda m=member: member_bytes(path, archive, m)  # type: ignore[misc]
            while archive.fileobj.read(1 << 20):
                pass  # to the checksum at the end, which is beyond the last file
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def member_bytes(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a file of the archive at `path` holds. It is read outside of `archive_files`, so errors are met here."""
    try:
        return archive.extractfile(member).read()  # type: ignore[union-attr]
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read: {member.name}: {error}") from None
