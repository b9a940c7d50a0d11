"""Any part of a text file, line by line, with errors that name file and line."""

from collections.abc import Iterator
from pathlib import Path


def read_lines(
    path: str | Path, start: int = 0, end: int | None = None, on_bad_bytes: str = "error"
) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their newlines, and the byte at which each begins.

    Args:
        start: First byte; that of a line.
        end: Lines that begin at this byte or later are left out; None: none are.
        on_bad_bytes: ``error``, or ``replace`` what is not UTF-8 by U+FFFD.

    Raises:
        ValueError: If a line is not UTF-8; the message has its number.
    """
    with open(path, "rb") as file:
        file.seek(start)
        position = start
        for line in file:
            if end is not None and position >= end:
                return
            try:
                encoding = "utf-8" if position else "utf-8-sig"  # some files begin with a byte order mark
                yield position, line.decode(encoding, "strict" if on_bad_bytes == "error" else "replace")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {line_number(path, position)}: byte {error.start + 1} of the line is not UTF-8"
                ) from error
            position += len(line)


def line_number(path: str | Path, position: int) -> int:
    """Number, from 1 on, of the line that begins at a byte."""
    with open(path, "rb") as file:
        return 1 + sum(
            chunk.count(b"\n") for chunk in iter(lambda: file.read(min(1 << 20, position - file.tell())), b"")
        )
