"""Documents in text files, read with errors that name file and line."""

import json
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
                yield position, line.decode("utf-8", "strict" if on_bad_bytes == "error" else "replace")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {line_number(path, position)}: byte {error.start + 1} of the line is not UTF-8; "
                    "--on_bad_bytes replace reads it as U+FFFD"
                ) from error
            position += len(line)


def line_number(path: str | Path, position: int) -> int:
    """Number, from 1 on, of the line that begins at a byte."""
    with open(path, "rb") as file:
        return 1 + sum(
            chunk.count(b"\n") for chunk in iter(lambda: file.read(min(1 << 20, position - file.tell())), b"")
        )


def parse_json_line(path: str | Path, number: int, line: str) -> dict:
    """One line of a JSON-lines file.

    Raises:
        ValueError: If it is no JSON object; the message has its number.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
    return record


def with_title(record: dict) -> str:
    """What an encoder reads of a passage: its title, if it has one, and its text."""
    title, text = record.get("title"), record["text"]
    return f"{title} {text}" if title else text
