"""A folder of .txt, .md and .jsonl files as short passages, with the place of each one. No torch."""

import bisect
import codecs
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..text.files import parse_object, text_field
from ..text.words import find_terms, terms

SUFFIXES = (".txt", ".md", ".jsonl")
BLOCK = 20_000  # characters that are tokenised at once
LONGEST_HEADING = 500  # characters: it is put before every passage below it
MARGIN = 4  # tokens that a passage may have more than it had within its file
_WORD = re.compile(r"\S+")
_HEADING = re.compile(r"(#{1,6})[ \t]+(.+)")
_UNDERLINE = re.compile(r"(=+|-{2,})[ \t]*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True)
class Piece:
    """A passage of a file."""

    line: int  # where it begins, from 1
    title: str
    text: str

    def full_text(self) -> str:
        """What is encoded: title and text."""
        return f"{self.title} {self.text}".strip() if self.title else self.text


def word_ends(text: str) -> list[int]:
    """Where words end, for encoders that do not say what their tokens are."""
    return [match.end() for match in _WORD.finditer(text)]


@dataclass(frozen=True)
class Limits:
    """How long a passage may be, so that an encoder reads the whole of it."""

    max_words: int = 120  # between blanks
    max_tokens: int = 1 << 30  # of title and text together
    token_ends: Callable[[str], list[int]] = word_ends  # where each token of a text ends, in characters
    prepare: Callable[[str], str] = str  # cleans up texts before they are cut

    def fit_title(self, headings: list[str]) -> tuple[str, int]:
        """Headings from the outermost on as a title, and the tokens that are left for a text.

        A title takes half of the tokens at most: outer headings are left out first, then its end.
        """
        room = max(2, self.max_tokens - MARGIN)
        title, ends = "", []
        for first in range(len(headings)):
            title = " > ".join(headings[first:])
            ends = self.token_ends(title)
            if len(ends) <= room // 2:
                break
        ends = ends[: room // 2]
        return title[: ends[-1]] if ends else "", room - len(ends)


def text_files(root: Path, on_unreadable: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """The file ``root``, or the files below the folder ``root`` in the order of their names; hidden ones are left out.

    ``on_unreadable`` is called for each folder that cannot be listed.
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


def read_pieces(path: Path, content: bytes, limits: Limits) -> tuple[list[Piece], str | None]:
    """The passages of one file, and a remark on what could not be read; ``ValueError`` if it is binary."""
    text, remark = decode(content)
    text, stem = limits.prepare(text), path.stem.replace("_", " ")
    if path.suffix.lower() == ".jsonl":
        pieces, bad_lines = _json_pieces(path, text, limits)
        if bad_lines:
            remark = f"{len(bad_lines)} lines are left out, the first of them {bad_lines[0]}"
        return pieces, remark
    sections = _sections(text) if path.suffix.lower() == ".md" else [([], 0, len(text), 1)]
    pieces = []
    for headings, start, end, line in sections:
        title, room = limits.fit_title([stem, *headings] if headings[:1] != [stem] else headings)
        found = list(split(text[start:end], title, room, limits, line))
        pieces += found or ([Piece(line - 1, title, "")] if headings else [])
    return pieces, remark


def decode(content: bytes) -> tuple[str, str | None]:
    """Text of a file in UTF-8, or in UTF-16 if it begins with its mark, and a remark on bytes that are neither."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in content:
        raise ValueError("a binary file")
    try:
        return content.decode(encoding), None
    except UnicodeDecodeError as error:
        remark = f"byte {error.start} is not {encoding[:6].rstrip('-').upper()}; what cannot be read became U+FFFD"
        return content.decode(encoding, errors="replace"), remark


def _json_pieces(path: Path, text: str, limits: Limits) -> tuple[list[Piece], list[str]]:
    """The passages of the lines that can be read, and what is wrong with the others."""
    pieces, bad_lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            where = f"{path.name}, line {number}"
            record = parse_object(line, where)
            title, body = text_field(record, "title", where, default=""), text_field(record, "text", where)
        except ValueError as error:
            bad_lines.append(str(error))
            continue
        title, room = limits.fit_title([title] if title else [])
        pieces += (Piece(number, title, piece.text) for piece in split(body, title, room, limits))
    return pieces, bad_lines


def _sections(text: str) -> Iterator[tuple[list[str], int, int, int]]:
    """(headings from the outermost on, start, end, line) of the parts of a Markdown file.

    Lines of front matter and between fences are no headings. A heading without a text of its own is a part if no
    smaller one follows it.
    """
    path: list[tuple[int, str]] = []  # level and words of the headings that are open
    start, first_line, fence, position = 0, 1, "", 0
    lines = text.split("\n")
    skip = _front_matter(lines)
    for number, line in enumerate(lines, start=1):
        here, position = position, position + len(line) + 1
        bare = line.strip()
        if number <= skip:
            continue
        if mark := _FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and bare == mark[1]:
                fence = ""
            continue
        level, words, begin = 0, "", here
        if not fence and (found := _HEADING.fullmatch(bare)) and not line[:1].isspace():
            level, words = len(found[1]), found[2].rstrip("# \t") or "#"
        elif not fence and _UNDERLINE.fullmatch(bare) and _is_lone_line(lines, number - 2, skip):
            level, words, begin = 1 + (bare[0] == "-"), lines[number - 2].strip(), here - len(lines[number - 2]) - 1
        if not level:
            continue
        if text[start:begin].strip() or (path and path[-1][0] >= level):
            yield [words for _, words in path], start, begin, first_line
        words = " ".join(words.split())[:LONGEST_HEADING]
        path = [*(heading for heading in path if heading[0] < level), (level, words)]
        start, first_line = position, number + 1
    if text[start:].strip() or path:
        yield [words for _, words in path], start, len(text), first_line


def _front_matter(lines: list[str]) -> int:
    """How many lines of settings between two rulers a file begins with."""
    if not lines or lines[0].strip() != "---":
        return 0
    return next((n for n, line in enumerate(lines[1:], start=2) if line.strip() in ("---", "...")), 0)


def _is_lone_line(lines: list[str], index: int, skip: int) -> bool:
    """Whether a line of words stands for itself, so that a ruler below it makes it a heading."""
    words = lines[index].strip() if index >= skip else ""
    before = lines[index - 1].strip() if index - 1 >= skip else ""
    return bool(words) and not before and not words.startswith(("#", ">", "-", "*", "+", "|", "`"))


def split(text: str, title: str, room: int, limits: Limits, line: int = 1) -> Iterator[Piece]:
    """Paragraphs of at most ``room`` tokens, joined while they are short and cut where they are long."""
    counted = begin = end = words = tokens = 0

    def piece() -> Piece:
        nonlocal counted, line
        line += text.count("\n", counted, begin)  # on from the piece before: all of them take one pass
        counted = begin
        return Piece(line, title, text[begin:end])

    for start, stop, more_words, more_tokens in _units(text, room, limits):
        if words and (words + more_words > limits.max_words or tokens + more_tokens > room):
            yield piece()
            words = tokens = 0
        begin, end = (begin if words else start), stop
        words, tokens = words + more_words, tokens + more_tokens
    if words:
        yield piece()


def _units(text: str, room: int, limits: Limits) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, words, tokens) of every paragraph, or of its parts."""
    paragraph: list[tuple[int, int, int]] = []
    for word in _words(text, room, limits.token_ends):
        if paragraph and text.count("\n", paragraph[-1][1], word[0]) > 1:
            yield from _parts(paragraph, room, limits.max_words)
            paragraph = []
        paragraph.append(word)
    yield from _parts(paragraph, room, limits.max_words)


def _parts(words: list[tuple[int, int, int]], room: int, max_words: int) -> Iterator[tuple[int, int, int, int]]:
    first, tokens = 0, 0
    for i, (_, _, count) in enumerate(words):
        if i > first and (i - first == max_words or tokens + count > room):
            yield words[first][0], words[i - 1][1], i - first, tokens
            first, tokens = i, 0
        tokens += count
    if words:
        yield words[first][0], words[-1][1], len(words) - first, tokens


def _words(text: str, room: int, token_ends: Callable[[str], list[int]]) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of all words, those of more than ``room`` tokens in several parts."""
    for block_start, block in _blocks(text):
        ends = token_ends(block)
        done = 0  # tokens
        for match in _WORD.finditer(block):
            start = match.start()
            last = bisect.bisect_right(ends, match.end(), done)
            while last - done > room:
                cut = max(ends[done + room - 1], start + 1)
                yield block_start + start, block_start + cut, room
                start, done = cut, done + room
            if start < match.end():
                yield block_start + start, block_start + match.end(), last - done
            done = last


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """(start, characters) of parts that a tokenizer takes in little memory, cut at blanks where there are any."""
    start = 0
    while start < len(text):
        end = start + BLOCK
        if end < len(text):
            blank = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = blank if blank > start else end
        yield start, text[start:end]
        start = end


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
