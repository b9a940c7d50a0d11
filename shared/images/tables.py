"""Tables that people write by hand or by a spreadsheet: one image a line, its label, perhaps more."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.run.files import atomic_file

from .decode import EXTENSIONS


def read_cells(path: str | os.PathLike, where: str, separator: str | None = None) -> list[tuple[int, list[str]]]:
    """Line number and cells, without blanks around them, of every line that is not blank.

    A byte-order mark does not count.

    Args:
        where: Flag and file, for messages.
        separator: Between the cells, which have no quotes then; by default the first line tells whether it is a tab, a
            semicolon or a comma.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            if separator is not None:
                lines = enumerate((line.rstrip("\r\n").split(separator) for line in file), start=1)
            else:
                first = file.readline()
                file.seek(0)
                reader = csv.reader(file, delimiter=next((mark for mark in "\t;" if mark in first), ","))
                lines = ((reader.line_num, line) for line in reader)
            return [(number, [cell.strip() for cell in line]) for number, line in lines if any(map(str.strip, line))]
    except (OSError, csv.Error) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def names_an_image(cell: str) -> bool:
    """Whether a cell can be a file's name rather than a heading."""
    return cell.lower().endswith((*EXTENSIONS, ".npy"))


def write_table(path: Path, heading: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write a CSV file that appears when it is complete; names of files may be no UTF-8."""
    with atomic_file(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([heading, *rows])
    return path
