"""Tables that people write by hand or by a spreadsheet: one image a line, its label, perhaps more."""

import csv
import os
from pathlib import Path

from .decode import EXTENSIONS


def read_cells(path: str | os.PathLike, where: str) -> list[tuple[int, list[str]]]:
    """Line number and cells, without blanks around them, of every line that is not blank.

    A ``.txt`` has tabs between its cells and no quotes; of another table the first line tells whether tabs, semicolons
    or commas separate them. A byte-order mark does not count.

    Args:
        where: Flag and file, for messages.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            if Path(path).suffix == ".txt":
                lines = enumerate((line.rstrip("\r\n").split("\t") for line in file), start=1)
            else:
                reader = csv.reader(file, dialect=_dialect(file))
                lines = ((reader.line_num, line) for line in reader)
            return [(number, [cell.strip() for cell in line]) for number, line in lines if any(map(str.strip, line))]
    except (OSError, csv.Error) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _dialect(file) -> type[csv.Dialect]:
    first = file.readline()
    file.seek(0)

    class Columns(csv.excel):
        delimiter = next((character for character in "\t;" if character in first), ",")

    return Columns


def names_an_image(cell: str) -> bool:
    """Whether a cell can be a file's name rather than a heading."""
    return cell.lower().endswith(EXTENSIONS)
