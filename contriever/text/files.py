"""Text files, tables of JSON lines and lists of records: any part of them, with errors that name file and line.

All of them may be compressed by gzip; their names end in ``.gz`` then, and positions count the bytes inside.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from shared.run.files import atomic_file


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file that takes the place of ``path``, durably and in one step, when it has been written."""
    opener = gzip.open if path.suffix == ".gz" else open
    with atomic_file(path) as temporary:
        with opener(temporary, mode if "b" in mode else "wt", encoding=None if "b" in mode else "utf-8") as file:
            yield file
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())


def ending(path: str | Path) -> str:
    """Of a file's name, ``.gz`` left out: what kind of text it holds."""
    return Path(str(path).removesuffix(".gz")).suffix


def find_packed(path: Path) -> Path | None:
    """The file, or the one that ends in ``.gz`` too; None if there is neither."""
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that is read; of one that ends in ``.gz`` what is inside."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def checksum(path: str | Path) -> int:
    """CRC-32 of what can be read of a file; the same of its compressed copy."""
    with open_bytes(path) as file:
        crc = 0
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
        return crc


def read_lines(
    path: str | Path, start: int = 0, end: int | None = None, on_bad_bytes: str = "error"
) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their newlines, and the byte at which each begins.

    Args:
        start: First byte; that of a line.
        end: Lines that begin at this byte or later are left out; None: none are.
        on_bad_bytes: ``error``, or ``replace`` what is not UTF-8 by U+FFFD.
    """
    with open_bytes(path) as file:
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
    with open_bytes(path) as file:
        return 1 + sum(
            chunk.count(b"\n") for chunk in iter(lambda: file.read(min(1 << 20, position - file.tell())), b"")
        )


def read_documents(path: str, start: int = 0, end: int | None = None, on_bad_bytes: str = "error") -> Iterator[str]:
    """Texts of a file with one document per line; those of a ``.jsonl`` file are title and text of its objects.

    A blank line is an empty document. The arguments are those of :func:`read_lines`.
    """
    for position, line in read_lines(path, start, end, on_bad_bytes):
        if ending(path) != ".jsonl" or not line.strip():
            yield line if line.strip() else ""
            continue
        try:
            record = parse_object(line, "")
            text = titled(text_field(record, "title", "", ""), text_field(record, "text", ""))
        except ValueError as error:  # counting lines costs a pass over the file: only when it is needed
            raise ValueError(f"{path}, line {line_number(path, position)}{error}") from None
        yield text


def titled(title: str, text: str) -> str:
    """What is encoded of a passage: its title, if it has one, and its text."""
    return f"{title} {text}" if title else text


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, default: dict | None = None):
    """The content of a JSON file; ``default``, if there is one, where there is no such file."""
    if default is not None and not path.is_file():
        return default
    try:
        with open_bytes(path) as file:
            return json.loads(file.read().decode())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_json(path: Path, value) -> None:
    with replacing(path) as file:
        json.dump(value, file, indent=1)


def first_difference(one: dict, other: dict):
    """The first key whose values differ; None if there is none."""
    return next((key for key in {**one, **other} if one.get(key) != other.get(key)), None)


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(file and line, object) for every line of a JSON lines file that is not blank."""
    for number, (_, line) in enumerate(read_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_object(line, where)


def write_json_lines(path: Path, records: Iterable[dict]) -> None:
    """One object per line; a file that exists is complete."""
    with replacing(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(place, object) for every line of a .jsonl file, or every entry of the list in a .json file."""
    path = Path(path)
    if ending(path) not in (".json", ".jsonl"):
        raise ValueError(f"{path}: expected a .json or .jsonl file")
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if ending(path) == ".jsonl":
        yield from read_json_lines(path)
        return
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, got {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, entry {number}: expected an object, got {type(record).__name__}")
        yield f"{path}, entry {number}", record


def parse_object(line: str, where: str) -> dict:
    """The JSON object in a line; ``where`` says in messages in which file and line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise ValueError(f"{where}: not JSON that can be read ({error})") from None
    if "\\ud" in line.lower():  # perhaps half of a character, which no tokenizer and no file takes
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: a \\u escape is half of a surrogate pair") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def text_field(record: dict, key: str, where: str, default: str | None = None) -> str:
    """A string of a record; numbers are accepted as ids, None like a missing key."""
    value = record.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f'{where}: no "{key}"')
    if isinstance(value, int) and not isinstance(value, bool) and key in ("id", "_id"):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" should be a string, got {json.dumps(value)[:80]}')
    return value


def check_list(record: dict, key: str, kind: type, what: str, where: str) -> None:
    """Raise ``ValueError`` unless ``record[key]`` is a list of values of this type, called ``what``."""
    values = record.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f'{where}: "{key}" should be a list of {what}')
