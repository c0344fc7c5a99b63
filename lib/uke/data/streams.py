"""The bytes and the lines of large files, packed or not, read piece by piece."""

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from uke.errors import InputError

LONGEST_LINE = (
    2**24
)  # bytes; a longer line is a binary file, or a list that was meant to be one object a line
PIECE = 2**16  # bytes
BROKEN = (EOFError, OSError, zlib.error)


class _Unpacked(io.RawIOBase):
    """The bytes of a bz2 file of one stream or many. `bz2.open` takes a damaged later stream for the file's end."""

    def __init__(self, path: Path):
        self.source, self.unpacker = path.open("rb"), bz2.BZ2Decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = b""
        while not data:
            packed = b""
            if self.unpacker.eof:
                packed = self.unpacker.unused_data or self.source.read(PIECE)
                if not packed:
                    return 0
                self.unpacker = bz2.BZ2Decompressor()
            elif self.unpacker.needs_input:
                packed = self.source.read(PIECE)
                if not packed:
                    raise EOFError("the archive ends in the middle of a stream")
            data = self.unpacker.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.source.close()
        super().close()


OPENERS = {
    ".bz2": (b"BZh", lambda path: io.BufferedReader(_Unpacked(path), PIECE)),
    ".gz": (b"\x1f\x8b", lambda path: gzip.open(path, "rb")),
}


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if it is a bz2 (of one stream or many) or gz archive; InputError otherwise."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory; expected a file of documents")
    try:
        with path.open("rb") as handle:
            start = handle.read(3)
        found = next(
            (suffix for suffix, (magic, _) in OPENERS.items() if start.startswith(magic)), ""
        )
        if start and path.suffix in OPENERS and found != path.suffix:
            raise InputError(
                f"{path}: is no {path.suffix[1:]} archive, though named one; expected the file as published"
            )
        return OPENERS[found][1](path) if found else path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a file of documents"
        ) from None


def damage(path: Path, error: Exception, read: str, cut: bool = False) -> InputError:
    """The InputError for a file that stops, or cannot be unpacked or parsed, once this much of it was `read`."""
    if cut or isinstance(error, EOFError):
        return InputError(f"{path}: is cut in the middle, {read}; expected the whole file")
    reason = " ".join(str(error).split())
    return InputError(f"{path}: is damaged ({reason}), {read}; expected the file as published")


def beginning(path: Path) -> str:
    """The first characters of a text file; InputError where it is empty, binary or cut before the first of them."""
    start = b""
    try:
        with opened(path) as handle:
            while len(start) < 2**14 and (more := handle.read1(2**14)):
                start += more
    except BROKEN as error:
        if not start:  # else the reader will say how far it came
            raise damage(path, error, "before its first document ends") from None
    if not start.strip():
        raise InputError(f"{path}: is empty; expected documents")
    if b"\0" in start:
        raise InputError(f"{path}: is a binary file; expected documents as UTF-8 text")
    try:
        return start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            raise InputError(
                f"{path}: byte {error.start} is not UTF-8; expected documents as text"
            ) from None
        return start[: error.start].decode("utf-8-sig")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line of a UTF-8 file; InputError at the first that is not text."""
    number = 0
    try:
        with opened(path) as handle:
            while line := handle.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE or b"\0" in line:
                    fault = (
                        "holds a NUL byte"
                        if b"\0" in line
                        else f"is longer than {LONGEST_LINE >> 20} MiB"
                    )
                    raise InputError(f"{path}: line {number} {fault}; expected lines of text")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: line {number}, byte {error.start} is not UTF-8; expected text"
        ) from None
    except BROKEN as error:
        raise damage(path, error, f"after line {number}") from None
