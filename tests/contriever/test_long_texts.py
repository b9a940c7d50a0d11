"""Passages and snippets of texts of every shape, against slow ways to the same, and how the work grows."""

import re
from pathlib import Path

import pytest

from contriever.own_texts.folder import Limits, Piece, marked, read_pieces, snippet
from tests.benchmarks.bench_own_texts import QUERY, SHAPES

LINE = re.compile(r"(#{1,6})[ \t]+(.+)")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def characters(text: str) -> list[int]:
    """Ends of tokens, of one character each."""
    return [i for i, character in enumerate(text, start=1) if not character.isspace()]


def in_fence(lines: list[str], number: int) -> bool:
    """Whether a line lies between fences, or is one: all lines before it are read again."""
    fence = ""
    for line in lines[:number]:
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
    return bool(fence or FENCE.match(lines[number]))


def slow_headings(lines: list[str]) -> list[tuple[int, int, int, str]]:
    """(line above, line below, level, words) of all headings."""
    found = []
    for n, line in enumerate(lines):
        if in_fence(lines, n):
            continue
        if mark := LINE.fullmatch(line.strip()):
            found.append((n, n + 1, len(mark[1]), " ".join(mark[2].split())[:500]))
        elif line == "---" and n and lines[n - 1].isalpha() and (n == 1 or not lines[n - 2].strip()):
            found.append((n - 1, n + 1, 2, lines[n - 1]))
    return found


def slow_pieces(stem: str, text: str, limits: Limits) -> list[Piece]:
    """Every question about a place is answered from the beginning of the text on."""
    lines, pieces = text.split("\n"), []
    headings = [(0, 0, 0, stem), *slow_headings(lines)]
    for i, (_, below, level, _) in enumerate(headings):
        following = headings[i + 1] if i + 1 < len(headings) else None
        path = [h[3] for j, h in enumerate(headings[: i + 1]) if all(h[2] < g[2] for g in headings[j + 1 : i + 1])]
        body = "\n".join(lines[below : following[0]] if following else lines[below:])
        title, room = limits.fit_title(path)
        found = [
            Piece(1 + below + body[:start].count("\n"), title, body[start:end])
            for start, end in slow_split(body, room, limits)
        ]
        if not found and i and (following is None or following[2] <= level):
            found = [Piece(below, title, "")]
        pieces += found
    return pieces


def slow_split(text: str, room: int, limits: Limits) -> list[tuple[int, int]]:
    """Paragraphs from part to part, as lists of words with their tokens that are added up again each time."""
    words, paragraphs = [], []
    for match in re.finditer(r"\S+", text):
        step = room if limits.token_ends is characters else len(match[0])
        for start in range(*match.span(), step):
            words.append((start, min(start + step, match.end())))
    for i, word in enumerate(words):
        if i == 0 or text[words[i - 1][1] : word[0]].count("\n") > 1:
            paragraphs.append([])
        paragraphs[-1].append(word)

    def fits(part: list[tuple[int, int]]) -> bool:
        tokens = sum(len(limits.token_ends(text[start:end])) for start, end in part)
        return len(part) <= limits.max_words and tokens <= room

    units: list[list[tuple[int, int]]] = []
    for paragraph in paragraphs:
        first = True
        for word in paragraph:
            if first or not fits([*units[-1], word]):
                units.append([])
            units[-1].append(word)
            first = False
    parts: list[list[tuple[int, int]]] = []
    for unit in units:
        if parts and fits([*parts[-1], *unit]):
            parts[-1] += unit
        else:
            parts.append(list(unit))
    return [(part[0][0], part[-1][1]) for part in parts]


@pytest.mark.parametrize("shape", SHAPES)
def test_passages_are_those_of_a_slow_way(shape):
    text = SHAPES[shape](3000)
    for limits in (Limits(7), Limits(7, 60, characters)):
        pieces, _ = read_pieces(Path("my_notes.md"), text.encode(), limits)
        assert pieces == slow_pieces("my notes", text, limits)


def test_paragraphs_that_fill_a_passage_exactly_are_one():
    pieces, _ = read_pieces(Path("notes.txt"), b"a b c\n\nd e f g\n\nh\n", Limits(7))
    assert [piece.text for piece in pieces] == ["a b c\n\nd e f g", "h"]


@pytest.mark.parametrize("shape", SHAPES)
def test_snippets_are_those_of_a_slow_way(shape):
    text = " ".join((SHAPES[shape](1500) + "heat " * 200 + SHAPES[shape](1500)).split())
    for query, width in ((QUERY, 300), ("stall", 90)):
        places = [start for start, _ in marked(text, query)]
        start = max(places, key=lambda p: (sum(p <= q < p + width for q in places), -p), default=0)
        before = text[start - width // 3 : start].partition(" ") if start >= width // 3 else ("", "", "")
        begin = start - len(before[2]) if before[1] else 0 if start < width // 3 else start
        part = text[begin : begin + width]
        part = f"{part.rpartition(' ')[0] or part} …" if begin + width < len(text) else part
        assert snippet(text, query, width) == (f"… {part}" if begin else part)


@pytest.mark.parametrize("shape", SHAPES)
def test_twice_the_text_gives_the_tokenizer_twice_the_characters(shape):
    def work(n: int) -> int:
        given = []

        def token_ends(text: str) -> list[int]:
            given.append(len(text))
            return [match.end() for match in re.finditer(r"\S+", text)]

        read_pieces(Path("a.md"), SHAPES[shape](n).encode(), Limits(120, 500, token_ends))
        return sum(given)

    assert work(40_000) <= 2.2 * work(20_000) + 1000
