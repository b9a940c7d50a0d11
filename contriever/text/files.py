"""Text files, tables of JSON lines and lists of records: any part of them, with errors that name file and line."""

import json
import os
from collections.abc import Iterable, Iterator
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


def read_documents(path: str, start: int = 0, end: int | None = None, on_bad_bytes: str = "error") -> Iterator[str]:
    """Texts of a file with one document per line; those of a ``.jsonl`` file are title and text of its objects.

    A blank line is an empty document. The arguments are those of :func:`read_lines`.
    """
    for position, line in read_lines(path, start, end, on_bad_bytes):
        if not path.endswith(".jsonl"):
            yield line
        elif not line.strip():
            yield ""
        else:
            try:
                record = parse_object(line, path, 0)
                title = text_field(record, "title", f"{path}, line 0", "")
                text = text_field(record, "text", f"{path}, line 0")
            except ValueError as error:  # counting lines costs a pass over the file: only when it is needed
                raise ValueError(str(error).replace("line 0", f"line {line_number(path, position)}", 1)) from None
            yield f"{title} {text}" if title else text


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSON lines file that is not blank.

    Raises:
        ValueError: If a line is not UTF-8 or not a JSON object; the message names it.
    """
    for number, (_, line) in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, parse_object(line, path, number)


def write_json_lines(path: Path, records: Iterable[dict]) -> None:
    """One object per line; a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(temporary, path)


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(place, object) for every line of a .jsonl file, or every entry of the list in a .json file.

    Raises:
        ValueError: If the file is no such list; the message names the line or the number of the entry.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: expected a .json or .jsonl file")
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.suffix == ".jsonl":
        yield from ((f"{path}, line {number}", record) for number, record in read_json_lines(path))
        return
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, got {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, entry {number}: expected an object, got {type(record).__name__}")
        yield f"{path}, entry {number}", record


def parse_object(line: str, path: str | Path, number: int) -> dict:
    """The JSON object in a line, whose number is for messages."""
    where = f"{path}, line {number}"
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
    """A string of a record; numbers are accepted as ids, None like a missing key.

    Raises:
        ValueError: If it is missing and has no default, or is something else; ``where`` says in which file and line.
    """
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
