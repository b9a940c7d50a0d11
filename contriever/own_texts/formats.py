"""Files of every type that is read as sections: a text with the headings above it and the place of each of its lines.

In time that grows with the length of a file, whatever is in it. No torch.
"""

import codecs
import csv
import html
import io
import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..text.files import parse_object, text_field

LIBRARIES = {".pdf": "pypdf", ".docx": "docx"}  # in the extra ``documents``
DEEPEST = 24  # level of headings
LONGEST_HEADING = 500  # characters: it is put before every passage below it
LARGEST_DOCUMENT = 1 << 29  # bytes of a .docx file when it is unpacked
LATIN_1 = "it is not UTF-8, and was read as Latin-1"
_HEADING = re.compile(r"(#{1,6})[ \t]+(.+)")
_UNDERLINE = re.compile(r"(=+|-{2,})[ \t]*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_RULER = re.compile(r"([!-/:-@\[-`{-~])\1{2,}")  # of reStructuredText
_NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*%?")
_DAMAGED = (  # what libraries raise for files that are not as they expect
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, EOFError, RuntimeError),
    *(struct.error, zlib.error),
)
_DEFINITION = re.compile(r"([ \t]*)(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)")


class Section(NamedTuple):
    """A part of a file."""

    headings: list[str]  # from the outermost on
    text: str
    places: Sequence[int]  # of its lines in the file, from 1; the last one holds for all that follow
    heading_place: int = 0  # for a heading without a text; 0: no heading


class Heading(NamedTuple):
    first: int  # line, from 0
    below: int  # the first line of the text below it
    level: int
    words: str


def read_sections(path: Path, content: bytes) -> tuple[list[Section], str | None]:
    """The sections of a file, and a remark on what could not be read; ``ValueError`` if nothing could be."""
    suffix, stem = path.suffix.lower(), path.stem.replace("_", " ")
    if suffix in LIBRARIES:
        return _pdf(content, stem) if suffix == ".pdf" else (_docx(content, stem), None)
    text, remark = decode(content)
    if suffix == ".jsonl":
        sections, bad_lines = _json_lines(path, text)
        if bad_lines:
            remark = f"{len(bad_lines)} lines are left out, the first of them {bad_lines[0]}"
        return sections, remark
    if suffix == ".csv":
        try:
            return list(_csv(text, stem)), remark
        except csv.Error as error:
            raise ValueError(f"no table: {error}") from None
    if suffix in (".html", ".htm"):
        lines, places, headings = _html(text)
        name = next((heading.words for heading in headings if heading.level == 0), stem)
        return list(_outline(lines, [h for h in headings if h.level], name, places)), remark
    lines = text.split("\n")
    return list(_outline(lines, _HEADINGS[suffix](lines), stem, range(1, len(lines) + 1))), remark


def missing_library(path: Path) -> str | None:
    """The library that alone can read a file, if it is not installed."""
    library = LIBRARIES.get(path.suffix.lower())
    return library if library is not None and find_spec(library) is None else None


def decode(content: bytes) -> tuple[str, str | None]:
    """Text of a file in UTF-8, or in UTF-16 if it begins with its mark, and a remark on bytes that are neither.

    A text that is hardly UTF-8 is taken as Latin-1, with the signs that Windows has added to it.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in content:
        raise ValueError("a binary file")
    try:
        return content.decode(encoding), None
    except UnicodeDecodeError as error:
        text = content.decode(encoding, errors="replace")
        bad = text.count("\ufffd")
        if encoding == "utf-8-sig" and 2 * bad > sum(character > "\x7f" for character in text):
            try:
                return content.decode("cp1252"), LATIN_1
            except UnicodeDecodeError:
                return content.decode("latin-1"), LATIN_1
        name = encoding[:6].rstrip("-").upper()
        return text, f"byte {error.start} is not {name}; what cannot be read became U+FFFD"


# --- Texts with headings ----------------------------------------------------------------------------------------------


def _outline(lines: list[str], headings: Iterable[Heading], name: str, places: Sequence[int]) -> Iterator[Section]:
    """The sections below the ``name`` of a file. A heading without a text is one if no smaller one follows it."""
    path = [Heading(0, 0, 0, name)]  # those that are open
    for heading in [*headings, Heading(len(lines), len(lines), 0, "")]:
        begin = path[-1].below
        is_lone = len(path) > 1 and path[-1].level >= heading.level
        if is_lone or any(line.strip() for line in lines[begin : heading.first]):
            words = [open_heading.words for open_heading in path]
            words = words[words[1:2] == words[:1] :]  # a file may be named like its only large heading
            here = slice(begin, heading.first)
            yield Section(words, "\n".join(lines[here]), places[here], places[begin - 1] if begin else 0)
        words = " ".join(heading.words.split())[:LONGEST_HEADING]
        path = [*(h for h in path if h.level < heading.level), heading._replace(words=words)]


def _markdown(lines: list[str]) -> Iterator[Heading]:
    """Lines of front matter and between fences are no headings."""
    fence, skip = "", _front_matter(lines)
    for number, line in enumerate(lines[skip:], start=skip):
        bare = line.strip()
        if mark := _FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and bare == mark[1]:
                fence = ""
        elif not fence and (found := _HEADING.fullmatch(bare)) and not line[:1].isspace():
            yield Heading(number, number + 1, len(found[1]), found[2].rstrip("# \t") or "#")
        elif not fence and _UNDERLINE.fullmatch(bare) and _is_lone_line(lines, number - 1, skip):
            yield Heading(number - 1, number + 1, 1 + (bare[0] == "-"), lines[number - 1])


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


def _restructured(lines: list[str]) -> Iterator[Heading]:
    """Lines with a ruler below them, or above as well; the rulers stand for levels in the order of their appearance."""
    levels: dict[tuple[str, bool], int] = {}
    for number in range(1, len(lines)):
        words, ruler = lines[number - 1].strip(), lines[number].rstrip()
        if not words or len(ruler) < len(words) or not _RULER.fullmatch(ruler) or _RULER.fullmatch(words):
            continue
        above = lines[number - 2].rstrip() if number > 1 else ""
        if not above or above == ruler:
            level = levels.setdefault((ruler[0], bool(above)), len(levels) + 1)
            yield Heading(number - 1 - bool(above), number + 1, level, words)


def _org(lines: list[str]) -> Iterator[Heading]:
    for number, line in enumerate(lines):
        stars, blank, words = line.partition(" ")
        if blank and stars.strip("*") == "" and stars and words.strip():
            yield Heading(number, number + 1, min(len(stars), DEEPEST), words)


def _python(lines: list[str]) -> Iterator[Heading]:
    """Functions and classes, whose first lines belong to their texts."""
    for number, line in enumerate(lines):
        if found := _DEFINITION.match(line):
            yield Heading(number, number, min(1 + len(found[1].expandtabs(4)), DEEPEST), found[2])


_HEADINGS = {
    ".md": _markdown,
    ".markdown": _markdown,
    ".rst": _restructured,
    ".org": _org,
    ".py": _python,
    ".txt": lambda lines: (),
}
SUFFIXES = (*_HEADINGS, ".html", ".htm", ".csv", ".jsonl", *LIBRARIES)


# --- HTML -------------------------------------------------------------------------------------------------------------

# What has no end of its own goes on to the end of the text, so that nothing is read twice. (The parser of the standard
# library takes 15 s for 20 kB of "<a ".)
_TAG = re.compile(
    r"""<!--.*?(?:-->|\Z)
    |<(?P<unread>script|style|template|svg)\b.*?(?:</(?P=unread)\s*>|\Z)
    |<[!?][^>]*(?:>|\Z)
    |<(?P<end>/?)(?P<name>[a-z][a-z0-9]*)(?:=\s*"[^"]*(?:"|\Z)|=\s*'[^']*(?:'|\Z)|[^>])*(?:>|\Z)""",
    re.S | re.I | re.X,
)
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img input ins kbd label mark q s samp small span "
    "strike strong sub sup time tt u var wbr".split()
)
_TITLES = ("title", "h1", "h2", "h3", "h4", "h5", "h6")  # by their levels
_ROWS = frozenset(("br", "dd", "dt", "li", "option", "tr"))  # end a line; all others end a paragraph


def _html(text: str) -> tuple[list[str], list[int], list[Heading]]:
    """Lines of text, their places, and the headings; the title of the page has level 0."""
    page, headings, opened, position = _Lines(), [], {}, 0
    for tag in _TAG.finditer(text):
        page.add(text[position : tag.start()])
        position = tag.end()
        name = (tag["name"] or "a").lower()
        if name in ("td", "th"):
            page.add("" if tag["end"] else " | ")
        elif name not in _INLINE:
            page.end_line(name not in _ROWS)
            if name == "pre":
                page.is_literal = not tag["end"]
            elif name in _TITLES and not tag["end"]:
                opened[name] = len(page.lines)
            elif name in opened:
                first, below = opened.pop(name), len(page.lines)
                words = " ".join(" ".join(page.lines[first:]).split())
                headings.append(Heading(first, below, _TITLES.index(name), words))
                if name == "title":  # no part of the text
                    page.lines[first:] = [""] * (below - first)
        page.place += tag[0].count("\n")
    page.add(text[position:])
    page.end_line()
    return page.lines, page.places, [heading for heading in headings if heading.words]


class _Lines:
    """Lines of text and their places, as the words of a page arrive."""

    def __init__(self):
        self.lines, self.places = [], []
        self.parts: list[str] = []  # of the line that is not finished
        self.place, self.begin = 1, 0  # where the words are that come next, and where that line begins
        self.is_literal = False

    def add(self, text: str) -> None:
        for number, part in enumerate(text.split("\n")):
            if number and self.is_literal:
                self.end_line()
            elif number:
                self.parts.append(" ")
            self.place += number > 0
            if part and not part.isspace():
                self.begin = self.begin or self.place
            self.parts.append(part)

    def end_line(self, paragraph: bool = False) -> None:
        words = html.unescape("".join(self.parts))
        words = words.replace("\n", " ").rstrip() if self.is_literal else " ".join(words.split()).removeprefix("| ")
        if words or (self.is_literal and self.lines[-1:] != [""]):
            self.lines.append(words)
        if paragraph and self.lines and self.lines[-1]:
            self.lines.append("")
        self.places += [self.begin or self.place] * (len(self.lines) - len(self.places))
        self.parts, self.begin = [], 0


# --- Tables, lists of records, documents ------------------------------------------------------------------------------


def _csv(text: str, stem: str) -> Iterator[Section]:
    """A section for each row, every cell with the name of its column where the first row has no number in it."""
    first = text[: text.find("\n")] if "\n" in text else text
    limit = csv.field_size_limit(len(text) + 1)  # of the whole process: others want theirs back
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=first.count))
        names, line = None, 1
        for row in rows:
            begin, line = line, rows.line_num + 1
            row = [" ".join(cell.split()) for cell in row]
            if names is None and any(row):
                names = [] if any(_NUMBER.fullmatch(cell) for cell in row) else row
                if names:
                    continue
            named = zip([*(names or []), *[""] * len(row)], row, strict=False)
            cells = (f"{name}: {cell}" if name else cell for name, cell in named if cell)
            yield Section([stem], "; ".join(cells), (begin,))
    finally:
        csv.field_size_limit(limit)


def _json_lines(path: Path, text: str) -> tuple[list[Section], list[str]]:
    """A section for each line that can be read, and what is wrong with the others."""
    sections, bad_lines = [], []
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
        sections.append(Section([title] if title else [], body, (number,)))
    return sections, bad_lines


def _pdf(content: bytes, stem: str) -> tuple[list[Section], str | None]:
    """A section for each page."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # what it mends is no news
    errors = (pypdf.errors.PyPdfError, pypdf.errors.DependencyError, *_DAMAGED)
    sections, problems = [], []
    try:
        pages = list(pypdf.PdfReader(io.BytesIO(content)).pages)
    except errors as error:
        raise ValueError(f"the PDF cannot be read: {str(error) or type(error).__name__}") from None
    for number, page in enumerate(pages, start=1):
        try:
            sections.append(Section([stem], page.extract_text(), (number,)))
        except errors as error:
            problems.append(f"page {number}: {str(error) or type(error).__name__}")
    if problems:
        return sections, f"{len(problems)} pages are left out, the first of them {problems[0]}"
    return sections, None if any(section.text.strip() for section in sections) else "not indexed: no text in the PDF"


def _docx(content: bytes, stem: str) -> list[Section]:
    """Sections below headings; places are numbers of paragraphs and tables."""
    import docx
    from docx.opc.exceptions import OpcError

    lines, places, headings = [], [], []
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST_DOCUMENT:
                raise ValueError("it is too large")
        for number, block in enumerate(docx.Document(io.BytesIO(content)).iter_inner_content(), start=1):
            if isinstance(block, docx.table.Table):
                found = [" | ".join(" ".join(cell.text.split()) for cell in row.cells) for row in block.rows]
            else:
                found = block.text.split("\n")
                style = re.fullmatch(r"Heading (\d)|Title", block.style.name or "")
                if style and block.text.strip():
                    headings.append(Heading(len(lines), len(lines) + len(found), 1 + int(style[1] or 0), block.text))
            lines += [*found, ""]
            places += [number] * (len(found) + 1)
    except (OpcError, SyntaxError, zipfile.BadZipFile, *_DAMAGED) as error:  # SyntaxError: of XML
        raise ValueError(f"the document cannot be read: {str(error) or type(error).__name__}") from None
    return list(_outline(lines, headings, stem, places))
