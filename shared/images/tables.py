"""Tables that people write by hand or by a spreadsheet: one image a line, its label, perhaps more."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

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


class Label(NamedTuple):
    """A line of a table of labels.

    Attributes:
        where: Flag, file and line, for messages.
        row: Of the image among all images.
        confidence: None where the table has none.
    """

    where: str
    image: str
    row: int
    label: str
    confidence: float | None


def read_labels(table: str, names: Sequence[str], of: str) -> list[Label]:
    """The lines of a table ``--labels``: image and label, or those of pseudo-labels, which have a confidence, too.

    An image is known by its name, or by any end of it (``b/c.png`` and ``c.png`` of ``a/b/c.png``) that no other image
    has. A first line that names none is a heading.

    Args:
        names: Of all images: paths, or paths below a folder.
        of: Which images these are, for messages.

    Raises:
        ValueError: If the table cannot be read, has other columns, or names unknown images.
    """
    parts = [name.replace(os.sep, "/").split("/") for name in names]
    ends = [(row, "/".join(part[i:])) for row, part in enumerate(parts) for i in range(1, len(part))]
    count = Counter(end for _, end in ends)
    row_of = {end: row for row, end in ends if count[end] == 1} | {"/".join(p): row for row, p in enumerate(parts)}

    lines, columns = read_cells(table, f"--labels {table}"), ["image", "label"]
    if lines and lines[0][1][0].removeprefix("./") not in row_of and not names_an_image(lines[0][1][0]):
        heading = [cell.lower() for cell in lines.pop(0)[1]]
        columns = heading if len(heading) > 2 else columns
    if not lines:
        raise ValueError(f"--labels {table} is empty")
    if columns[:2] != ["image", "label"] or columns[2:3] not in ([], ["confidence"]):
        raise ValueError(
            f"--labels {table}: expected two columns, image and label, or those of pseudo_labels.csv, image, label, "
            f"confidence; got {', '.join(columns)}"
        )
    labels = []
    for number, cells in lines:
        where = f"--labels {table}, line {number}"
        if len(cells) != len(columns) or not all(cells):
            what = "an image and its label" if len(columns) == 2 else ", ".join(columns)
            raise ValueError(f"{where}: expected {what}, got {cells}")
        try:
            confidence = float(cells[2]) if len(columns) > 2 else None
        except ValueError as error:
            raise ValueError(f"{where}: the confidence {cells[2]!r} is no number") from error
        image = cells[0].removeprefix("./")
        labels.append(Label(where, image, row_of.get(image, -1), cells[1], confidence))
    if unknown := [label for label in labels if label.row == -1]:
        raise ValueError(
            f"{unknown[0].where}: {unknown[0].image!r} is not {of}, or several images have that name; so it is with "
            f"{len(unknown)} of the {len(labels)} images of this table"
        )
    return labels


def label_of_each(labels: Iterable[Label]) -> dict[int, str]:
    """Label of each image by its row.

    Raises:
        ValueError: If an image has two.
    """
    found = {}
    for label in labels:
        if found.setdefault(label.row, label.label) != label.label:
            raise ValueError(f"{label.where}: {label.image} has the label {found[label.row]!r} already")
    return found


def write_table(path: Path, heading: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write a CSV file that appears when it is complete; names of files may be no UTF-8."""
    with atomic_file(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([heading, *rows])
    return path
