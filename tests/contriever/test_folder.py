"""Which files of a folder are read, and the passages of every type of file."""

import codecs
import io
import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from contriever.own_texts import walk as walk_module
from contriever.own_texts.folder import Limits, place, read_pieces
from contriever.own_texts.formats import LATIN_1, SUFFIXES, decode
from contriever.own_texts.walk import text_files


def write(root: Path, *names: str, text: str = "wing") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def names(root: Path, **choice) -> tuple[set[str], dict[str, int]]:
    """Files that are read, and what is left out."""
    left_out = Counter()
    found = [path.relative_to(root).as_posix() for path in text_files(root, left_out=left_out, **choice)]
    assert len(found) == len(set(found))
    return set(found), dict(+left_out)


def pieces(name: str, content: bytes | str, limits: Limits | None = None) -> list[tuple[int, str, str]]:
    found, remark = read_pieces(
        Path(name), content.encode() if isinstance(content, str) else content, limits or Limits()
    )
    assert remark is None
    return [(piece.line, piece.title, piece.text) for piece in found]


# --- Which files ------------------------------------------------------------------------------------------------------


def test_ignore_files_and_exclusions_are_obeyed_and_counted(tmp_path):
    pytest.importorskip("pathspec")
    write(tmp_path, "a.md", "b.txt", "build/c.md", "sub/build/d.md", "sub/e.txt", "sub/keep.txt", "sub/f.org", "x.png")
    write(tmp_path, "drafts/g.md", "drafts/deep/h.md", ".hidden.md", ".git/i.md", ".gitconfig")
    write(tmp_path, ".gitignore", text="build/\n*.txt\n!keep.txt\n\\\n")  # the last one is no pattern
    assert names(tmp_path) == (
        {"a.md", "drafts/g.md", "drafts/deep/h.md", "sub/keep.txt", "sub/f.org"},
        {"hidden": 2, "ignored": 4, ".png": 1},
    )
    write(tmp_path, ".ignore", text="!/b.txt\n")  # has the last word before .gitignore
    write(tmp_path, "sub/.gitignore", text="/f.org\n!e.txt\n")  # and a deeper folder before both
    assert names(tmp_path, exclude=["drafts/deep", "a.*"]) == (
        {"b.txt", "drafts/g.md", "sub/e.txt", "sub/keep.txt"},
        {"hidden": 2, "ignored": 3, "excluded": 2, ".png": 1},
    )
    with pytest.raises(ValueError, match="--exclude !: this is no pattern"):
        names(tmp_path, exclude=["!"])


def test_without_its_library_an_ignore_file_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path, "a.md", ".gitignore")
    monkeypatch.setattr(walk_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/.gitignore: patterns need pathspec, pip install")):
        names(tmp_path)


def test_an_ignore_file_that_cannot_be_read_leaves_its_folder_out(tmp_path, monkeypatch):
    write(tmp_path, "a.md", "sub/.gitignore", "sub/secret.md")
    read_text = Path.read_text

    def refuses(path, **options):
        if path.name == ".gitignore":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", refuses)
    errors = []
    assert [path.name for path in text_files(tmp_path, errors.append)] == ["a.md"]
    assert [error.filename for error in errors] == [str(tmp_path / "sub")]


def test_links_to_folders_are_followed_by_a_flag_and_never_in_a_circle(tmp_path):
    root = tmp_path / "notes"
    write(tmp_path, "notes/b/c.md", "outside/d.md", "outside/deep/e.md")
    os.symlink(tmp_path / "outside", root / "a")
    os.symlink(root / "b", root / "again")  # comes before "b", which is read where it lies
    os.symlink(root, root / "b" / "up")
    os.symlink(tmp_path / "outside", tmp_path / "outside" / "self")
    os.symlink(tmp_path / "outside" / "d.md", root / "file.md")
    assert names(root) == ({"b/c.md", "file.md"}, {"linked": 3})
    assert names(root, follow_links=True) == ({"b/c.md", "file.md", "a/d.md", "a/deep/e.md"}, {})


# --- Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text", "remark"),
    [
        ("Zürich".encode(), "Zürich", None),
        ("\ufeffZürich".encode(), "Zürich", None),
        ("Zürich".encode("utf-16"), "Zürich", None),
        (b"Z\xfcrich", "Zürich", LATIN_1),
        ("“12 €”".encode("cp1252"), "“12 €”", LATIN_1),
        (b"\x81 Z\xfcrich", "\x81 Zürich", LATIN_1),  # what Windows has not defined
        ("Zürich Genève ".encode() + b"\xff", "Zürich Genève \ufffd", "byte 16 is not UTF-8"),
        (codecs.BOM_UTF16_LE + b"a\0b", "a\ufffd", "byte 4 is not UTF-16"),
    ],
)
def test_encodings(content, text, remark):
    found = decode(content)
    assert found[0] == text and (found[1] or "").startswith(remark or "") and bool(found[1]) == bool(remark)


RST = """=====
Birds
=====

Wings
-----
They stall.

====  ====
a     b
====  ====

Tails
~~~~~
short
no title
====

Feet
----
"""


def test_headings_of_restructured_text_and_org():
    assert pieces("birds.rst", RST) == [
        (7, "birds > Birds > Wings", "They stall.\n\n====  ====\na     b\n====  ===="),
        (15, "birds > Birds > Wings > Tails", "short\nno title\n===="),
        (20, "birds > Birds > Feet", ""),
    ]
    assert pieces("a.org", "intro\n* One\ntext\n*bold*\n*** Two :tag:\n* Three\n** \nend") == [
        (1, "a", "intro"),
        (3, "a > One", "text\n*bold*"),
        (5, "a > One > Two :tag:", ""),
        (7, "a > Three", "** \nend"),
    ]
    assert pieces("a.markdown", "# One\ntext") == [(2, "a > One", "text")]


def test_definitions_are_the_headings_of_python():
    source = '"""Wings."""\n\nclass Wing:\n    def stall(self):\n        return 1\n\nasync def fly():\n    ...\n'
    assert pieces("wing.py", source) == [
        (1, "wing", '"""Wings."""'),
        (3, "wing > Wing", "class Wing:"),
        (4, "wing > Wing > stall", "    def stall(self):\n        return 1".strip()),
        (7, "wing > fly", "async def fly():\n    ..."),
    ]


HTML = """<!DOCTYPE html><html><head><title>Birds &amp; <b>wings</title>
<style>p { color: red }</style><script>if (a < b) alert("</p>")</script></head>
<body><!-- <p>no -->
<h1>Birds</h1><p>The <em>wing</em>s
of a bird&#39;s<br>body.</p><div title="a > b">They stall</div>
<h2>Table</h2><table><tr><th>name</th><th>span</th></tr>
<tr><td>swift</td><td>0.4&nbsp;m</td></tr></table>
<pre>
for x:
    fly(x)
</pre><p>1 < 2 &lt;b&gt;</p><h3>Empty</h3>
"""


def test_html_is_read_as_text_with_its_headings_and_lines():
    assert pieces("a.html", HTML) == [
        (4, "Birds & wings > Birds", "The wings of a bird's\nbody.\n\nThey stall"),
        (6, "Birds & wings > Birds > Table", "name | span\nswift | 0.4 m\n\nfor x:\n    fly(x)\n\n1 < 2 <b>"),
        (11, "Birds & wings > Birds > Table > Empty", ""),
    ]
    assert pieces("index.htm", "a<p>b") == [(1, "index", "a\n\nb")]
    last = pieces("a.html", HTML, Limits(max_words=4))[-2]
    assert last[0] == 11 and last[2].endswith("1 < 2 <b>")


UNITS = (
    "<",
    "<!--",
    "<a ",
    "<a b='",
    "<script>",
    "</script ",
    "&",
    "<p>",
    "<b>a</b>",
    "\n<pre>",
    "<h1>a",
    "<h1>a</h1>",
)


@pytest.mark.parametrize("unit", UNITS)
def test_html_of_any_shape_is_read_in_no_time(unit):
    began = time.process_time()
    read_pieces(Path("a.html"), (unit * (100_000 // len(unit))).encode(), Limits())
    assert time.process_time() - began < 30  # a quadratic way takes minutes


def test_rows_of_a_table_have_the_names_of_their_columns():
    text = 'name;phone;note\nAda;12;"two\nlines; one"\n\nBob;;\nEve;3;x;more\n'
    assert pieces("people.csv", text) == [
        (2, "people", "name: Ada; phone: 12; note: two lines; one"),
        (5, "people", "name: Bob"),
        (6, "people", "name: Eve; phone: 3; note: x; more"),
    ]
    assert pieces("a.csv", "1,b\r\n2,c\r\n") == [(1, "a", "1; b"), (2, "a", "2; c")]
    assert pieces("a.csv", f"a\n{'x' * 200_000}\n")[0][2] == f"a: {'x' * 200_000}"
    many = pieces("a.csv", "a\n" + "w " * 30 + "\n", Limits(max_words=9))
    assert [line for line, *_ in many] == [2] * 4


def pdf(*texts: str) -> bytes:
    """The smallest PDF with a page for each text."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", ""]
    for text in texts:
        stream = f"BT /F 12 Tf ({text}) Tj ET"
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
        font = "/Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/Resources<<{font}>>/Contents {len(objects)} 0 R>>")
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(texts)))
    objects[1] = f"<</Type/Pages/Count {len(texts)}/MediaBox[0 0 99 99]/Kids[{kids}]>>"
    body = "%PDF-1.4\n" + "".join(f"{n} 0 obj{o}endobj\n" for n, o in enumerate(objects, start=1))
    return f"{body}trailer<</Root 1 0 R/Size {len(objects) + 1}>>\nstartxref\n0\n%%EOF".encode()


def test_pages_of_a_pdf():
    pytest.importorskip("pypdf")
    assert pieces("my_report.pdf", pdf("A wing.", "It stalls.")) == [
        (1, "my report", "A wing."),
        (2, "my report", "It stalls."),
    ]
    assert place("a/my_report.PDF", 2) == "a/my_report.PDF, page 2" and place("a.b/c", 2) == "a.b/c:2"
    assert read_pieces(Path("a.pdf"), pdf(""), Limits()) == ([], "not indexed: no text in the PDF")
    broken = pdf("A wing.", "It stalls.").replace(b"It stalls.) Tj", b"It stalls. Tj  ")
    for content in (b"", b"%PDF-1.4", b"wing" * 99, pdf("a")[:90]):
        with pytest.raises(ValueError, match="the PDF cannot be read"):
            read_pieces(Path("a.pdf"), content, Limits())
    assert next(piece.text for piece in read_pieces(Path("a.pdf"), broken, Limits())[0]) == "A wing."


def test_paragraphs_and_tables_of_a_docx(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("Birds", 1)
    document.add_paragraph("A wing.\nIt stalls.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "swift", "0.4 m"
    document.add_heading("Empty", 2)
    stream = io.BytesIO()
    document.save(stream)
    assert pieces("a.docx", stream.getvalue()) == [
        (2, "a > Birds", "A wing.\nIt stalls.\n\nswift | 0.4 m"),
        (4, "a > Birds > Empty", ""),
    ]
    assert place("a.docx", 2) == "a.docx, paragraph 2"
    for content in (b"", b"PK", stream.getvalue()[:999], b"wing" * 99):
        with pytest.raises(ValueError, match="the document cannot be read"):
            read_pieces(Path("a.docx"), content, Limits())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_of_any_type_has_no_passage(suffix):
    if suffix not in (".pdf", ".docx"):
        assert pieces(f"a{suffix}", "") == pieces(f"a{suffix}", " \n\n") == []
