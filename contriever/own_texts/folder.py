"""Files as short passages, with the place of each one, and the part of a passage that fits a query. No torch."""

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..text.words import find_terms, terms
from .formats import read_sections

BLOCK = 20_000  # characters that are tokenised at once
QUESTION_WORDS = frozenset(  # which say nothing about a text where they occur
    terms(
        "about am can could did do does from had has have he her his how i me my our she should so than them us we "
        "what when where which who whom whose why would you your"
    )
)
MARGIN = 4  # tokens that a passage may have more than it had within its file
_WORD = re.compile(r"\S+")


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


def read_pieces(path: Path, content: bytes, limits: Limits) -> tuple[list[Piece], str | None]:
    """The passages of one file, and a remark on what could not be read; ``ValueError`` if nothing could be."""
    sections, remark = read_sections(path, content)
    pieces = []
    for headings, text, places, heading_place in sections:
        title, room = limits.fit_title([limits.prepare(heading) for heading in headings])
        found = list(split(limits.prepare(text), title, room, limits))
        pieces += (replace(piece, line=places[min(piece.line, len(places)) - 1]) for piece in found)
        if heading_place and not found:
            pieces.append(Piece(heading_place, title, ""))
    return pieces, remark


def place(path: str, line: int) -> str:
    """Where a passage is, for a person."""
    unit = unit_of(path)
    return f"{path}:{line}" if unit == "line" else f"{path}, {unit} {line}"


def unit_of(path: str) -> str:
    """What the places within a file are."""
    return {".pdf": "page", ".docx": "paragraph"}.get(path[path.rfind(".") :].lower(), "line")


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
    wanted = wanted - QUESTION_WORDS or wanted
    for start, end, term in find_terms(text):
        if term not in wanted:
            continue
        if spans and start < spans[-1][1]:  # pairs of characters overlap
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans
