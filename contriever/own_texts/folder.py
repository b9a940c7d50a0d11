"""A folder of .txt, .md and .jsonl files as short passages, with the place of each one. No torch."""

import codecs
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..text.files import parse_object, text_field
from ..text.words import find_terms, terms

SUFFIXES = (".txt", ".md", ".jsonl")
_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|$))+")  # lines up to a blank one
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.M)


@dataclass(frozen=True)
class Piece:
    """A passage of a file.

    Attributes:
        line: Where it begins, from 1.
    """

    line: int
    title: str
    text: str

    def full_text(self) -> str:
        """What is encoded: title and text."""
        return f"{self.title} {self.text}" if self.title else self.text


def text_files(root: Path, on_unreadable: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """The file ``root``, or the files below the folder ``root`` in the order of their names; hidden ones are left out.

    Args:
        on_unreadable: Called for each folder that cannot be listed.

    Raises:
        ValueError: If there is no such file or folder, or it is a file of another kind.
    """
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--passages {root}: expected a folder or a file ending in {', '.join(SUFFIXES)}")
        yield root
        return
    if not root.is_dir():
        raise ValueError(f"--passages {root}: no such file or folder")
    for folder, subfolders, names in os.walk(root, onerror=on_unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder) / name


def read_pieces(path: Path, content: bytes, max_words: int) -> tuple[list[Piece], str | None]:
    """Passages of at most ``max_words`` words of one file, and a remark if bytes of it could not be read.

    Raises:
        ValueError: If the file is binary, or a line of a .jsonl file is malformed.
    """
    text, remark = decode(content)
    stem = path.stem.replace("_", " ")
    if path.suffix.lower() == ".jsonl":
        return list(_json_pieces(path, text, max_words)), remark
    if path.suffix.lower() == ".md":
        return list(_markdown_pieces(text, stem, max_words)), remark
    return list(split(text, stem, max_words)), remark


def decode(content: bytes) -> tuple[str, str | None]:
    """Text of a file in UTF-8, or in UTF-16 if it begins with its mark, and a remark on bytes that are neither.

    Raises:
        ValueError: If the file is binary.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in content:
        raise ValueError("a binary file")
    try:
        return content.decode(encoding), None
    except UnicodeDecodeError as error:
        remark = f"byte {error.start} is not {encoding[:6].rstrip('-').upper()}; what cannot be read became U+FFFD"
        return content.decode(encoding, errors="replace"), remark


def _json_pieces(path: Path, text: str, max_words: int) -> Iterator[Piece]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = parse_object(line, path.name, number)
            where = f"{path.name}, line {number}"
            title = text_field(record, "title", where, default="")
            for piece in split(text_field(record, "text", where), title, max_words):
                yield Piece(number, piece.title, piece.text)


def _markdown_pieces(text: str, stem: str, max_words: int) -> Iterator[Piece]:
    """Sections are split one by one; the heading is the title."""
    fences = [
        match.span() for match in re.finditer(r"^```.*?^```", text, re.M | re.S)
    ]  # comments are no headings there
    headings = [h for h in _HEADING.finditer(text) if not any(a <= h.start() < b for a, b in fences)]
    starts, titles = [0, *(h.start() for h in headings)], [stem, *(h[1] for h in headings)]
    bodies = [0, *(h.end() for h in headings)]
    for title, body, end in zip(titles, bodies, [*starts[1:], len(text)], strict=True):
        first_line = text.count("\n", 0, body)
        for piece in split(text[body:end], title, max_words):
            yield Piece(first_line + piece.line, title, piece.text)


def split(text: str, title: str, max_words: int) -> Iterator[Piece]:
    """Paragraphs, joined while they are short and cut where they are long, so that no piece exceeds ``max_words``."""
    begin = end = words = 0
    for start, stop, count in _units(text, max_words):
        if words and words + count > max_words:
            yield _piece(text, begin, end, title)
            words = 0
        begin, end, words = (begin if words else start), stop, words + count
    if words:
        yield _piece(text, begin, end, title)


def _units(text: str, max_words: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, number of words) of every paragraph, or of its parts."""
    for paragraph in _PARAGRAPH.finditer(text):
        words = [match.span() for match in re.compile(r"\S+").finditer(text, *paragraph.span())]
        for i in range(0, len(words), max_words):
            part = words[i : i + max_words]
            yield part[0][0], part[-1][1], len(part)


def _piece(text: str, begin: int, end: int, title: str) -> Piece:
    return Piece(1 + text.count("\n", 0, begin), title, text[begin:end])


def snippet(text: str, query: str, width: int = 300) -> str:
    """The part of ``text`` of about ``width`` characters that holds most words of the query, on one line."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    places = [start for start, _ in marked(text, query)]
    best, first = (0, 0), 0
    for last, place in enumerate(places):  # both ends only go on: long texts take no longer than their length
        while place - places[first] >= width:
            first += 1
        best = max(best, (last - first + 1, -places[first]))
    start = -best[1]
    if start < width // 3:
        start = 0
    elif (blank := text.find(" ", start - width // 3, start)) >= 0:
        start = blank + 1
    part = text[start : start + width]
    if start + width < len(text):
        part = part.rsplit(" ", 1)[0] + " …"
    return f"… {part}" if start else part


def marked(text: str, query: str) -> list[tuple[int, int]]:
    """(start, end) of the words of the query in a text, whatever their case, accents and endings; none overlaps."""
    wanted, spans = set(terms(query, single=False)), []
    for start, end, term in find_terms(text):
        if term not in wanted:
            continue
        if spans and start < spans[-1][1]:  # pairs of characters overlap
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans
