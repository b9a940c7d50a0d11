"""Searching a folder of texts: what is indexed, what is embedded again, what is answered, what is refused."""

import html
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from contriever import search as search_script
from contriever.own_texts import background
from contriever.own_texts import index as index_module
from contriever.own_texts.background import LiveIndex
from contriever.own_texts.folder import Limits, Piece, read_pieces
from contriever.own_texts.index import SearchIndex
from contriever.own_texts.page import SearchServer, serve
from contriever.own_texts.rendering import SCRIPT, Asked, mark, render_results
from contriever.search import get_args_parser, search
from tests.contriever.tiny import tiny_retriever

WORDS = ["bread", "bike", "chain", "crust", "stall", "wing", "script"]


def bag_of_words(texts: list[str], kind: str = "") -> np.ndarray:
    """An encoder whose scores are easy to predict."""
    counts = np.array([[text.lower().count(word) for word in WORDS] for text in texts], np.float32)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)


class Counting:
    """The encoder, and all texts that it was given."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts: list[str], kind: str) -> np.ndarray:
        self.texts += texts
        return bag_of_words(texts)


@pytest.fixture
def notes(tmp_path) -> Path:
    folder = tmp_path / "notes"
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "a.md").write_text("# Bread\n\nThe crust of bread.\n\n## Bikes\n\nOil the chain of the bike.\n")
    (folder / "sub" / "b.txt").write_text("A wing can stall.")
    (folder / "c.jsonl").write_text('{"text": "wing", "title": "Wing"}\n\n{"text": "bread and bike"}\n')
    (folder / ".hidden.txt").write_text("wing")
    (folder / "sub" / ".git" / "d.txt").write_text("wing")
    (folder / "e.png").write_bytes(b"wing")
    return folder


def open_index(notes: Path, encode=bag_of_words, model: int = 1) -> SearchIndex:
    return SearchIndex(notes, notes / ".index", encode, {"model": model})


def rows(index: SearchIndex) -> list[tuple]:
    """All that is known of the passages, in the order of their places."""
    return index.database.execute(
        "SELECT path, line, title, text, terms, vectors.vector FROM passages JOIN texts USING (id) "
        "JOIN vectors ON vectors.id = passages.vector ORDER BY path, number"
    ).fetchall()


# --- Texts to passages ------------------------------------------------------------------------------------------------


MARKDOWN = """---
tags: x
# no heading
---
intro

# One
text a
```
# no heading
~~~
```
~~~~
# nor here
~~~
~~~~

## Two ##


text b

Three
=====

### Four

Five
-----
text c

- a
---
"""


def test_passages_of_markdown_know_their_headings():
    pieces, remark = read_pieces(Path("my_notes.md"), MARKDOWN.encode(), Limits(50))
    assert remark is None
    assert pieces == [
        Piece(1, "my notes", "---\ntags: x\n# no heading\n---\nintro"),
        Piece(8, "my notes > One", "text a\n```\n# no heading\n~~~\n```\n~~~~\n# nor here\n~~~\n~~~~"),
        Piece(21, "my notes > One > Two", "text b"),
        Piece(26, "my notes > Three > Four", ""),
        Piece(30, "my notes > Three > Five", "text c\n\n- a\n---"),
    ]
    (only,), _ = read_pieces(Path("Zeus.md"), b"# Zeus\ntext", Limits())
    assert only == Piece(2, "Zeus", "text")
    blanks = " " * 100_000  # no attempt at every one of them
    (only,), _ = read_pieces(Path("Zeus.md"), f"# Zeus{blanks}and Hera #{blanks}#\ntext".encode(), Limits())
    assert only.title.split() == ["Zeus", ">", "Zeus", "and", "Hera"]


LONG = {
    "words": "the wing of a thin plate , the heat " * 40,
    "table": "\n".join(f"{i};wing;plate;{i * i};heat,jet;cone" for i in range(60)),
    "no blanks": "東京の天気は晴れです。" * 60,
    "one line": "flow;" * 300,
    "addresses": "\n\n".join(f"wing@plate-{i}.example/heat?x={i}&y=cone" for i in range(30)),
    "one block": "wing" * 9000,
}


@pytest.mark.parametrize("what", LONG)
def test_an_encoder_reads_the_whole_of_every_passage(what, tmp_path):
    retriever = tiny_retriever(tmp_path)  # reads 64 tokens
    retriever.prompts = {"passage": "the wing : "}
    room = retriever.max_length - len(retriever.tokenize([""], kind="passage")[0])
    headings = "# the wing of a thin plate\n## shock wave , heat and jet\n## " + "body " * 90 + "\n"
    for suffix, before in ((".txt", ""), (".md", headings)):
        limits = Limits(120, room, retriever.token_ends)
        pieces, _ = read_pieces(tmp_path / f"heat{suffix}", (before + LONG[what]).encode(), limits)
        texts = [retriever.prompts["passage"] + piece.full_text() for piece in pieces]
        lengths = [len(ids) for ids in retriever.tokenizer(texts)["input_ids"]]
        assert max(lengths) <= retriever.max_length
        assert len(pieces) < 3 * sum(lengths) / retriever.max_length + 3
        found = "".join("".join(piece.text.split()) for piece in pieces)
        assert found == "".join(LONG[what].split())  # nothing is lost, and nothing twice


def test_words_are_marked_whatever_their_form():
    assert mark("The <Cafés>, C++ & 東京都", "the cafe c++ 東京") == (
        "The &lt;<mark>Cafés</mark>&gt;, <mark>C++</mark> &amp; <mark>東京</mark>都"
    )
    assert mark("How I keep what I have", "how do I keep it?") == "How I <mark>keep</mark> what I have"
    assert mark("What now?", "what") == "<mark>What</mark> now?"


# --- The index --------------------------------------------------------------------------------------------------------


def test_passages_are_found_with_their_places(notes, monkeypatch):
    index = open_index(notes)
    update = index.update()
    assert (update.new, update.embedded, len(index), update.problems) == (3, 5, 5, {})
    best = index.search("bike chain", 2)
    assert [(hit.path, hit.line, hit.title) for hit in best] == [("a.md", 7, "a > Bread > Bikes"), ("c.jsonl", 3, "")]
    assert best[0].score == pytest.approx(
        bag_of_words(["bike chain"])[0] @ bag_of_words(["Bread Bikes chain bike"])[0], abs=1e-3
    )
    assert [hit.path for hit in index.search("stall", 10, "bm25")] == ["sub/b.txt"]
    assert [hit.path for hit in index.search('"chain of the bike"', 3)] == ["a.md"]
    assert index.search('"bike of the chain"', 3) == index.search('"chains of the bike"', 3) == []
    monkeypatch.chdir(notes)
    here = SearchIndex(Path("."), Path(".index"), bag_of_words, {"model": 1})
    assert here.update().unchanged == 3
    assert index.search("stall wing", 10, "hybrid")[0].path == "sub/b.txt"
    with pytest.raises(ValueError, match="query is empty"):
        index.search("  ", 3)


def test_every_literal_match_comes_before_what_only_means_something_like_it(tmp_path):
    """Among 802 notes that all speak of invoices."""
    for i in range(1000, 1800):
        (tmp_path / f"{i}.txt").write_text(f"The invoices of customer {i} from 2022-{i} were paid in room {i % 7}.")
    (tmp_path / "a.txt").write_text("Invoice 2023-117 is open.")
    (tmp_path / "b.txt").write_text(f"Minutes of a long meeting. {'We spoke about the café. ' * 3} Also: 2023-117.")

    def encode(texts, kind):  # nearly one direction, as texts of one kind have
        rng = np.random.default_rng(len(texts))
        vectors = rng.standard_normal((len(texts), 64)).astype(np.float32) + 1.0
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    index = SearchIndex(tmp_path, tmp_path / ".index", encode, {"normalized": True})
    index.update()
    for retriever in ("hybrid", "bm25"):
        best = index.search("invoice 2023-117", 802, retriever)
        assert {hit.path for hit in best[:2]} == {"a.txt", "b.txt"}, retriever
    assert len(best) == 802  # "invoices" is found too
    for retriever in ("dense", "hybrid", "bm25"):
        assert {hit.path for hit in index.search('"2023-117" invoice', 9, retriever)} == {"a.txt", "b.txt"}
        assert index.search('"117-2023"', 9, retriever) == []
    assert index.search("cafe", 1, "bm25")[0].path == "b.txt"
    assert all(" room 3." in hit.text for hit in index.search('"room 3"', 200))


def test_only_what_changed_is_embedded_again(notes):
    encode = Counting()
    open_index(notes, encode).update()
    index = open_index(notes, encode)
    encode.texts.clear()
    assert index.update().describe().startswith("0 new, 0 changed, 0 removed and 3 unchanged files; 0 passages")
    with open(notes / "a.md", "a") as file:
        file.write("\n# Stall\n\nA wing.\n")
    (notes / "new.txt").write_text("script")
    (notes / "c.jsonl").unlink()
    os.utime(notes / "sub" / "b.txt", (1, 1))  # another time, the same content
    update = index.update()
    assert (update.new, update.changed, update.removed, update.unchanged) == (1, 1, 1, 1)
    assert encode.texts == ["a > Stall A wing.", "new script"]
    assert {hit.path for hit in index.search("wing", 10)} == {"a.md", "new.txt", "sub/b.txt"}
    assert index.update().unchanged == 3

    fresh = SearchIndex(notes, notes / ".fresh", bag_of_words, {"model": 1})
    fresh.update()
    assert rows(fresh) == rows(index)


@pytest.mark.parametrize("call", range(1, 8))
def test_killed_within_a_large_file_it_embeds_no_text_twice_but_the_last(notes, monkeypatch, call):
    monkeypatch.setattr(index_module, "PASSAGES_PER_TRANSACTION", 4)
    (notes / "b.txt").write_text("\n\n".join(f"{'w ' * 118}bike {i}" for i in range(15)))
    whole = SearchIndex(notes, notes / ".whole", bag_of_words, {"model": 1})
    told = []
    assert whole.update(lambda update: told.append(update.done / update.size)).embedded == 20
    assert told == sorted(told) and 0 == told[0] < told[1] < told[-1] == 1 and len(told) >= 7
    encode, calls = Counting(), []

    def dies(texts, kind):
        calls.append(texts)
        if len(calls) == call:
            raise KeyboardInterrupt
        return encode(texts, kind)

    if call <= 6:
        with pytest.raises(KeyboardInterrupt):
            open_index(notes, dies).update()
    assert len(open_index(notes)) in (0, 17, 20)  # no part of a file is found
    index = open_index(notes, encode)
    index.update()
    assert len(encode.texts) == len(set(encode.texts)) == 20
    assert rows(index) == rows(whole)
    assert index.database.execute("SELECT count(*) FROM vectors").fetchone() == (20,)


def test_touched_and_moved_texts_embed_nothing_and_what_is_gone_leaves_nothing_behind(notes):
    encode = Counting()
    open_index(notes, encode).update()
    encode.texts.clear()
    os.utime(notes / "a.md", (1, 1))
    (notes / "sub" / "deep").mkdir()
    shutil.copy(notes / "c.jsonl", notes / "copy.jsonl")
    shutil.move(notes / "sub" / "b.txt", notes / "sub" / "deep" / "b.txt")
    index = open_index(notes, encode)
    index.update()
    assert encode.texts == []
    for file in notes.glob("*.jsonl"):
        file.unlink()
    index.update()
    assert [row[0] for row in rows(index)] == ["a.md", "a.md", "sub/deep/b.txt"]
    for table in ("vectors", "texts", "passages", "files"):
        assert index.database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 2 + (table != "files")


def test_an_empty_place_where_a_disk_may_be_mounted_drops_nothing(notes):
    index = SearchIndex(notes, notes.with_name("index"), bag_of_words, {"model": 1})
    index.update()
    notes.rename(notes.with_name("elsewhere"))
    with pytest.raises(ValueError, match="no such file or folder"):
        index.update()
    notes.mkdir()
    update = index.update()
    assert update.removed == 0 and len(index) == 5 and index.search("wing", 1)
    assert "holds no text, is its disk there? 3 files stay as they were found last" in update.kept
    assert any("--drop_missing forgets them" in remark for remark in update.remarks())
    assert index.update(drop_missing=True).removed == 3 and len(index) == 0


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o400, 0o555), (0o600, 0o555), (0o400, 0o755)])
def test_an_index_that_cannot_be_written_is_searched(file_mode, folder_mode):
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are closed to others
        notes = Path(folder) / "notes"
        notes.mkdir()
        (notes / "a.txt").write_text("wing")
        open_index(notes).update()
        (notes / "late.txt").write_text("stall")
        encode = Counting()
        for path, mode in ((notes / ".index", file_mode), (notes, folder_mode), (Path(folder), 0o755)):
            path.chmod(mode)
            if os.geteuid() == 0:
                os.chown(path, nobody, nobody)
        if was_root := os.geteuid() == 0:  # who can write everywhere
            os.seteuid(nobody)
        try:
            index = open_index(notes, encode)
            update = index.update()
            assert "index cannot be written and is searched as it is" in update.kept
            assert encode.texts == []  # nothing in vain
            assert [hit.path for hit in index.search("wing", 3)] == ["a.txt"]
            with pytest.raises(ValueError, match="--index_path puts it elsewhere"):
                SearchIndex(notes, notes / ".other" / "index", encode, {"model": 1}).update()
        finally:
            if was_root:
                os.seteuid(0)
            notes.chmod(0o755)


def test_a_huge_file_is_named_and_not_read(notes):
    with open(notes / "huge.txt", "wb") as file:
        file.truncate(12_000_000_000)  # which takes no room on the disk
    update = open_index(notes).update()
    assert update.problems == {"huge.txt": "not indexed: it has 12.0 GB, and more than 0.5 are not read"}
    assert update.new == 3


def test_problems_are_told_and_the_rest_is_indexed(notes):
    (notes / "bad.jsonl").write_text('{"text": "wing"}\n{"text": 3}\n')
    (notes / "cut.jsonl").write_text('{"text": "wing"')
    (notes / "binary.txt").write_bytes(b"wing\0")
    (notes / "empty.txt").write_text(" \n")
    (notes / "half.jsonl").write_text('{"text": "wing \\ud83d"}')
    os.mkfifo(notes / "pipe.txt")
    (notes / "latin.txt").write_bytes(b"wing in Z\xfcrich")
    index = open_index(notes)
    expected = {
        "bad.jsonl": '1 lines are left out, the first of them bad.jsonl, line 2: "text" should be a string, got 3',
        "cut.jsonl": "line 1: not JSON",
        "binary.txt": "not indexed: a binary file",
        "empty.txt": "not indexed: it is empty",
        "half.jsonl": "line 1: a \\u escape is half of a surrogate pair",
        "pipe.txt": "it is no regular file",
        "latin.txt": "read as Latin-1",
    }
    for update in (index.update(), index.update()):  # told every time
        assert update.problems.keys() == expected.keys()
        assert all(expected[name] in problem for name, problem in update.problems.items())
    hits = index.search("wing", 4)
    assert {hit.path for hit in hits} == {"bad.jsonl", "latin.txt", "sub/b.txt", "a.md"}
    assert [path for hit in hits for path, *_ in hit.others] == ["c.jsonl"]


def test_documents_without_their_library_are_counted_and_stay_as_they_were(notes, monkeypatch):
    pytest.importorskip("docx").Document().save(notes / "old.docx")
    index = open_index(notes)
    monkeypatch.setattr(index_module, "read_pieces", lambda *_: ([Piece(1, "", "crust")], None))
    index.update()
    monkeypatch.setattr("contriever.own_texts.formats.find_spec", lambda name: None)
    (notes / "new.pdf").write_bytes(b"")
    update = index.update()
    assert update.left_out["documents"] == 1 and update.problems == {} and update.removed == 0
    assert update.remarks() == ["left out: 2 hidden, 1 PDF or DOCX (pip install -e '.[documents]'), 1 .png"]
    places = {(hit.path, *(path for path, *_ in hit.others)) for hit in index.search("crust", 1)}
    assert places == {("a.md", "c.jsonl", "old.docx", "sub/b.txt")}


def test_texts_of_a_folder_that_cannot_be_listed_stay(notes, monkeypatch):
    index = open_index(notes)
    index.update()
    scandir = os.scandir

    def refuses(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    (notes / "c.jsonl").unlink()
    update = index.update()
    assert update.removed == 1
    assert "cannot be listed: Permission denied" in update.problems[str(notes / "sub")]
    assert index.search("stall", 1)[0].path == "sub/b.txt"


@pytest.mark.parametrize("content", [b"no database at all, but a text that is long enough" * 20, None])
def test_a_damaged_index_is_one_clear_error(notes, content):
    if content is None:  # the end is gone
        open_index(notes).update()
        content = (notes / ".index").read_bytes()[:9000]
    (notes / ".index").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.index (is damaged|cannot be used)"):
        index = open_index(notes)
        index.update()
        index.search("wing", 3)


def test_equal_texts_are_one_hit_that_names_its_places(notes):
    (notes / "copy.md").write_text((notes / "a.md").read_text())
    (notes / "folded.txt").write_text("Oil the  CHAIN of\nthe bike.")
    (notes / "headings.md").write_text("# Chain\n# Bike\n")
    index = open_index(notes)
    index.update()
    for retriever in ("dense", "bm25", "hybrid"):
        hits = index.search("bike chain", 9, retriever)
        (hit,) = (hit for hit in hits if "oil" in hit.text.lower())
        places = {(hit.path, hit.line, hit.number), *hit.others}
        assert places == {("a.md", 7, 1), ("copy.md", 7, 1), ("folded.txt", 1, 0)} and len(hit.others) == 2
        assert [hit.others for hit in hits if hit.path == "headings.md"] == [(), ()]  # no text, other headings
    assert len(index.search("bike chain", 3)) == 3
    assert hit.record()["others"] == [{"path": path, "line": line} for path, line, _ in hit.others]


# --- The script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_retriever(folder).save(folder)
    return folder


def run(model: Path, *flags: str):
    return search(get_args_parser().parse_args(["--model_name_or_path", str(model), "--device", "cpu", *flags]))


def test_one_command_indexes_and_answers(notes, model, capsys):
    index = run(model, "--passages", str(notes), "--query", "wing", "--top_k", "2")
    out = capsys.readouterr().out
    assert "3 new" in out and "5 in all" in out
    assert out.count("\n1. ") == out.count("\n2. ") == 1 and "3. " not in out.split("2. ")[-1]
    assert (notes / ".search_index.sqlite").exists()
    dense = index.encode(["wing"], "query")[0] @ index.encode(["Wing wing"], "passage")[0]
    assert any(hit.score == pytest.approx(dense, abs=0.05) for hit in index.search("wing", 5) if hit.title == "Wing")
    run(model, "--passages", str(notes), "--query", "wing", "--retriever", "hybrid")
    assert "3 unchanged files; 0 passages embedded" in capsys.readouterr().out


def test_programs_get_one_json_object(notes, model, capsys):
    (notes / "copy.txt").write_text("A WING can stall.")
    run(model, "--passages", str(notes), "--query", "stall", "--retriever", "bm25", "--exclude", "a.*", "--json")
    found, told = capsys.readouterr()
    answer = json.loads(found)
    (hit,) = answer.pop("results")
    assert answer == {"query": "stall", "left_out": {"hidden": 2, "excluded": 1, ".png": 1}, "state": ""}
    assert hit.pop("score") > 0 and hit == {
        "path": "copy.txt",
        "line": 1,
        "unit": "line",
        "title": "copy",
        "text": "A WING can stall.",
        "others": [{"path": "sub/b.txt", "line": 1}],
    }
    assert "3 new" in told and "left out: 2 hidden, 1 by --exclude, 1 .png" in told
    run(model, "--passages", str(notes), "--query", "stall", "--retriever", "bm25")
    assert "   the same text: sub/b.txt:1\n" in capsys.readouterr().out


def test_texts_neither_command_the_terminal_nor_reach_other_users(notes, model, capsys):
    (notes / "\x1b[31mred.md").write_text("# Wing \x9b2J\n\nwing \x1b]0;title\x07 wing")
    run(model, "--passages", str(notes), "--query", "wing", "--top_k", "9")
    out = "".join(capsys.readouterr())
    assert "\ufffd[31mred.md:3" in out and not set(out) & {"\x1b", "\x9b", "\x07"}
    file = notes / ".search_index.sqlite"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)  # as older versions left it
    run(model, "--passages", str(notes))
    assert file.stat().st_mode & 0o777 == 0o600


def test_neither_the_index_nor_its_journal_is_readable_by_others(notes):
    before = os.umask(0)
    try:
        index = open_index(notes)
        index.update()
        index.database.execute("DELETE FROM texts")
        files = list(notes.glob(".index*"))
        assert sorted(file.name for file in files) == [".index", ".index-journal"]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    finally:
        os.umask(before)


def test_a_single_file_and_an_index_elsewhere(notes, model, tmp_path, capsys):
    index_path = tmp_path / "elsewhere.sqlite"
    run(model, "--passages", str(notes / "sub" / "b.txt"), "--index_path", str(index_path), "--query", "wing")
    assert "b.txt:1" in capsys.readouterr().out and index_path.exists()
    run(model, "--passages", str(notes / "sub" / "b.txt"))
    assert (notes / "sub" / ".b.txt.search_index.sqlite").exists()


def test_rebuild_replaces_a_damaged_index(notes, model, capsys):
    (notes / ".search_index.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match="--rebuild"):
        run(model, "--passages", str(notes))
    run(model, "--passages", str(notes), "--rebuild")
    assert "3 new" in capsys.readouterr().out


def test_bad_flags_of_the_script(notes, model):
    for flags, message in (
        (["--passages", str(notes / "none")], "no such file or folder"),
        (["--passages", str(notes / "e.png")], "expected a folder or a file"),
        (["--passages", str(notes), "--top_k", "0"], "--top_k 0"),
        (["--passages", str(notes), "--port", "65536"], "--port 65536"),
        (["--passages", str(notes), "--rebuild", "--index_path", str(notes / "sub" / "b.txt")], "is no index"),
        (["--passages", str(notes), "--query", " "], "query is empty"),
        (["--passages", str(notes), "--json"], "--json needs --query"),
        (["--passages", str(notes), "--mcp", "--serve"], "--mcp goes without"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, *flags)
    assert (notes / "sub" / "b.txt").read_text() == "A wing can stall."
    assert search_script.INDEX_NAME.startswith(".")  # so that it is not indexed itself


def test_errors_are_printed_without_what_a_terminal_obeys(tmp_path):
    script = Path(search_script.__file__)
    for flags in (["--passages", f"{tmp_path}/\x1b[31mnone\n\x9b2J"], ["--passages", ".", "\x1b]0;x\x07"]):
        done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
        assert done.returncode == 2 and "\ufffd" in done.stderr
        assert not set(done.stdout + done.stderr) & {"\x1b", "\x9b", "\x07"}


# --- The page ---------------------------------------------------------------------------------------------------------

ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture
def server(notes):
    (notes / f"{'<i>x'}.md").write_text(f"# {ATTACK}\n\nscript {ATTACK} of a wing\n")
    live = LiveIndex(lambda: open_index(notes))
    with SearchServer(live, "127.0.0.1", 0, 3, "dense", 0.5) as server:
        assert live._quiet.wait(30)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: SearchServer, path: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    found = response.status, response.read().decode(), response.headers
    connection.close()
    return found


def test_a_browser_that_goes_away_is_no_error_of_the_server(server, monkeypatch, capsys):
    answered = threading.Event()
    monkeypatch.setattr(server, "shutdown_request", lambda request: (request.close(), answered.set()))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as browser:
        browser.sendall(b"GET / HT")
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
    assert answered.wait(30)
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_of_the_texts_or_the_query_becomes_markup(server):
    query = quote("script " + ATTACK)
    address = html.unescape(re.search(r'href="(/passage[^"#]*i%3Ex.md[^"#]*)', get(server, f"/?q={query}")[1])[1])
    for path in (f"/?q={query}", address, f"/passage?path={query}&number=0&q={query}", f"/?q={query}&k={query}"):
        _, page, headers = get(server, path)
        page = page.replace(f"<script>{SCRIPT}</script>", "")
        assert "alert(2)" in page
        for markup in ("<script", "<img", "<i>"):
            assert markup not in page
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and re.search("script-src 'sha256-[^' ]+';", policy)
        assert headers["X-Content-Type-Options"] == "nosniff"
    page = render_results(Asked(ATTACK), [], 0, problem=ATTACK, state=ATTACK)
    assert "<script" not in page.replace(f"<script>{SCRIPT}</script>", "")


def test_a_hit_opens_its_passage_with_its_neighbours(server, notes):
    (notes / "long.md").write_text("".join(f"# Part {n}\n\ntext {n} about saddles\n\n" for n in range(30)))
    server.index._index.update()
    page = get(server, "/?q=saddles&retriever=bm25&k=1")[1]
    address = html.unescape(re.search(r'href="(/passage[^"]*)#hit"', page)[1])
    assert address == "/passage?q=saddles&retriever=bm25&k=1&path=long.md&number=0"
    address = address.replace("number=0", "number=9")
    status, page, _ = get(server, address)
    assert status == 200 and re.findall(r"text (\d+) about <mark>saddles</mark>", page) == [
        str(n) for n in range(6, 13)
    ]
    assert re.findall(r'id="hit".*Part (\d+)', page) == ["9"] and "line 39" in page
    (wider,) = {html.unescape(link) for link in re.findall(r'href="([^"]*around=12)#hit"', page)}
    assert "Earlier passages" in page and "Later passages" in page
    page = get(server, wider)[1]
    assert re.findall(r"text (\d+) about", page) == [str(n) for n in range(22)] and "Earlier" not in page
    assert 'href="/?q=saddles&amp;retriever=bm25&amp;k=1">Back' in page
    for path in ("/etc/passwd", "../notes/long.md", ".index", "e.png", ".hidden.txt", "LONG.MD", ""):
        status, page, _ = get(server, f"/passage?path={quote(path)}&number=0&q=kept")
        assert status == 404 and "no such passage" in page and 'value="kept"' in page
    for number in ("30", "-1", "x", "9" * 30, "1e1", ""):
        assert get(server, f"/passage?path=long.md&number={number}")[0] == 404


def test_the_retriever_is_chosen_on_the_page_and_the_query_is_kept(server):
    assert get(server, "/?q=stall&retriever=bm25")[1].count("<li") == 1
    _, page, _ = get(server, "/?q=stall&retriever=hybrid&k=2")
    assert page.count("<li") == 2 and re.findall('value="([a-z0-9]+)" aria-pressed="true"', page) == ["hybrid"]
    assert '<button name="retriever" value="hybrid">Search' in page  # what the Enter key presses
    assert '<input type="hidden" name="k" value="2">' in page and "k=4" in page  # more results
    for wrong in ("q=kept&retriever=none", "q=kept&k=0", f"q=kept{'+' * 9}{'x' * 2000}"):
        status, page, _ = get(server, f"/?{wrong}")
        assert status == 400 and re.search('name="q" value="kept', page) and 'role="alert"' in page


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/../etc/passwd", {}, 404),
        ("/?q=wing&k=101", {}, 400),
        ("/?q=wing&k=0000000019999", {}, 400),
        ("/search.json?q=wing&k=x", {}, 400),
        ("/?q=wing", {"Host": "evil.example"}, 403),
        ("/?q=wing", {"Host": "localhost:1"}, 200),
        ("/?q=%ff%00", {}, 200),
        ("/passage?path=a.md&number=0", {"Host": "evil.example"}, 403),
    ],
)
def test_requests_that_are_refused(server, path, headers, status):
    assert get(server, path, **headers)[0] == status


def test_new_notes_are_found_while_it_serves(server, notes, monkeypatch):
    monkeypatch.setattr(background, "SECONDS_BETWEEN_UPDATES", -1)
    monkeypatch.setattr(background, "SECONDS_TO_WAIT", 30)
    (notes / "late.txt").write_text("crust crust")
    assert "late.txt" in get(server, "/?q=crust")[1]
    notes.rename(notes.with_name("away"))
    status, page, _ = get(server, "/?q=crust")
    assert status == 200 and "no such file or folder; texts are searched as they were found last" in page
    assert "late.txt" in page


class Slow:
    """An encoder that waits."""

    def __init__(self):
        self.go = threading.Event()

    def __call__(self, texts: list[str], kind: str) -> np.ndarray:
        if kind == "passage" and any("stall" in text for text in texts):
            assert self.go.wait(30)
        return bag_of_words(texts)


def test_it_listens_at_once_and_searches_what_is_indexed_already(notes, monkeypatch):
    monkeypatch.setattr(index_module, "PASSAGES_PER_TRANSACTION", 2)
    monkeypatch.setattr(background, "SECONDS_TO_WAIT", 0.01)
    encode, loaded, began = Slow(), threading.Event(), time.monotonic()
    live = LiveIndex(lambda: loaded.wait(30) and open_index(notes, encode))
    with SearchServer(live, "127.0.0.1", 0, 3, "dense", 0.5) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        status, body, _ = get(server, "/search.json?q=wing")
        assert status == 503 and json.loads(body)["error"] == "the encoder is being loaded"
        assert get(server, "/?q=wing")[0] == 503 and "the encoder is being loaded" in get(server, "/")[1]
        loaded.set()
        state = re.compile(r"indexing: 2 of 3 files, \d\d%, about \d+ s left")
        while not state.fullmatch((found := json.loads(get(server, "/search.json?q=bread")[1])).get("state") or ""):
            assert time.monotonic() - began < 25
            time.sleep(0.01)
        assert {hit["path"] for hit in found["results"]} == {"a.md", "c.jsonl"}
        assert found["state"] in get(server, "/?q=bread")[1]
        assert time.monotonic() - began < 30  # nobody has waited for the encoder
        encode.go.set()
        while json.loads(get(server, "/search.json?q=stall")[1])["state"]:
            time.sleep(0.01)
        assert json.loads(get(server, "/search.json?q=stall&k=1")[1])["results"][0]["path"] == "sub/b.txt"
        server.shutdown()
        thread.join()


def test_serving_ends_where_there_is_no_index_to_serve(notes):
    open_index(notes).update()
    with pytest.raises(ValueError, match="made by another model or with other settings: its model is 1, now it is 2"):
        serve(LiveIndex(lambda: open_index(notes, model=2)), "127.0.0.1", 0, 3, "dense", 0.5)
