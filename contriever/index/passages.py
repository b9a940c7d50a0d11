"""Passage and question files: read line by line, with errors that name the line; single passages looked up in place.

A passage file holds tens of millions of passages (Wikipedia in blocks of 100 words: 21 million, 13 GB). Only the place
of each one in the file is kept in memory, 16 bytes.
"""

import csv
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..text.files import (
    check_list,
    checksum,
    ending,
    open_bytes,
    parse_object,
    read_lines,
    read_records,
    text_field,
    titled,
)


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str

    def full_text(self) -> str:
        return titled(self.title, self.text)


def read_passages(path: Path, start: int = 0, columns: int | None = None) -> Iterator[tuple[int, int, Passage]]:
    """(byte position, line number counted from ``start``, passage) of a .tsv or .jsonl file.

    Columns are id, text, title, and quoted ones may hold tabs and line breaks; or id and text as they are (MS MARCO).
    """
    if ending(path) == ".tsv":
        for position, number, row in read_columns(path, columns or count_columns(path), start):
            yield position, number, Passage(row[0], text=row[1], title="".join(row[2:]))
        return
    if ending(path) != ".jsonl":
        raise ValueError(f"--passages {path}: expected a .tsv or .jsonl file")
    for number, (position, line) in enumerate(read_lines(path, start), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            record = parse_object(line, where)
            text, title = text_field(record, "text", where), text_field(record, "title", where, default="")
            yield position, number, Passage(id_field(record, where), title, text)


def id_field(record: dict, where: str) -> str:
    return text_field(record, "_id" if "_id" in record else "id", where)


def count_columns(path: Path) -> int:
    """Two, if the first line of a .tsv file has so many; else three."""
    reader = csv.reader((line for _, line in read_lines(path)), delimiter="\t")
    try:
        return 2 if len(next(filter(None, reader), [])) == 2 else 3
    except csv.Error:
        return 3


def read_columns(path: Path, columns: int, start: int = 0) -> Iterator[tuple[int, int, list[str]]]:
    """(byte position, line number counted from ``start``, columns) of tab-separated lines but a header.

    Two columns, id and text, are taken as they are; three may be quoted.
    """
    positions = []  # of the lines of the current record: the reader takes no line more than it needs

    def lines() -> Iterator[str]:
        for position, line in read_lines(path, start):
            positions.append(position)
            yield line

    def place() -> str:
        last = reader.line_num
        return f"line {number}" if number == last else f"lines {number} to {last}, which are one record"

    quoting = csv.QUOTE_NONE if columns == 2 else csv.QUOTE_MINIMAL
    reader = csv.reader(lines(), delimiter="\t", quoting=quoting)
    while True:
        positions.clear()
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, {place()}: {error}") from None
        if row is None:
            return
        if row and row[0] not in ("id", "pid", "qid"):  # a header
            if len(row) != columns:
                names = ", ".join(("id", "text", "title")[:columns])
                raise ValueError(f"{path}, {place()}: {len(row)} columns, expected {columns}: {names}")
            yield positions[0], number, row


class PassageFile:
    """The passages of a .tsv (id, text, title) or .jsonl file (``id`` or ``_id``, ``text``, perhaps ``title``).

    The file is read through once; after that single passages are read from their places, those of a compressed file
    from a temporary copy of what is inside.

    Attributes:
        num_empty: Passages without title and text.

    Raises:
        ValueError: If a line is malformed, two passages have the same id, or there is none.
    """

    def __init__(self, path: str | Path):
        self.path = self._places = Path(path)
        self._columns = count_columns(self.path) if ending(path) == ".tsv" else None
        self.num_empty = 0
        positions, hashes = array("q"), array("q")
        for position, _, passage in read_passages(self.path, 0, self._columns):
            positions.append(position)
            hashes.append(hash(passage.id))
            self.num_empty += not passage.full_text().strip()
        if not positions:
            raise ValueError(f"{self.path} has no passages")
        self.crc = checksum(self.path)
        self._positions, hashes = (np.frombuffer(a, dtype=np.int64) for a in (positions, hashes))
        self._order = np.argsort(hashes, kind="stable")
        self._sorted_hashes = hashes[self._order]
        self._refuse_duplicates()

    def _refuse_duplicates(self) -> None:
        equal = self._sorted_hashes[1:] == self._sorted_hashes[:-1]
        suspects = set(self._sorted_hashes[1:][equal].tolist())
        seen = {}
        for _, number, passage in read_passages(self.path, 0, self._columns) if suspects else ():
            if hash(passage.id) in suspects:
                if passage.id in seen:
                    raise ValueError(
                        f"{self.path}: lines {seen[passage.id]} and {number} have the same id {passage.id!r}"
                    )
                seen[passage.id] = number

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, row: int) -> Passage:
        if self._places.suffix == ".gz":
            self._copy = tempfile.NamedTemporaryFile(suffix=ending(self.path))  # noqa: SIM115 - kept as long as this
            with open_bytes(self.path) as packed:
                shutil.copyfileobj(packed, self._copy)
            self._copy.flush()
            self._places = Path(self._copy.name)
        return next(self.read(row))

    def read(self, start: int = 0) -> Iterator[Passage]:
        """Passages in the order of the file, from number ``start``."""
        for _, _, passage in read_passages(self._places, int(self._positions[start]), self._columns):
            yield passage

    def find(self, passage_id: str) -> Passage:
        """The passage with an id; ``ValueError`` if there is none."""
        first, last = (np.searchsorted(self._sorted_hashes, hash(passage_id), side) for side in ("left", "right"))
        for row in self._order[first:last].tolist():
            if (passage := self[row]).id == passage_id:
                return passage
        raise ValueError(f"--passages {self.path} has no passage {passage_id!r}: the embeddings are of another file")


def read_questions(path: str | Path) -> list[dict]:
    """Questions of a .json file (a list) or .jsonl file: objects with ``question`` and a list of ``answers``."""
    records = []
    for where, record in read_records(path):
        text_field(record, "question", where)
        check_list(record, "answers", str, "strings", where)
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no questions")
    return records
