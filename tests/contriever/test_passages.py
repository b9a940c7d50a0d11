"""Passage and question files: content, places, and errors that name the line."""

import gzip
import json

import pytest

from contriever.index.passages import Passage, PassageFile, read_questions

TSV = 'id\ttext\ttitle\n1\tplain\tOne\n2\t"two\nlines, a\ttab and ""quotes"""\tTwo\n3\tlast\t\n'
PASSAGES = [
    Passage("1", "One", "plain"),
    Passage("2", "Two", 'two\nlines, a\ttab and "quotes"'),
    Passage("3", "", "last"),
]


def write(path, text) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(params=["tsv", "jsonl"])
def passages(request, tmp_path):
    text = TSV if request.param == "tsv" else "\n".join(jsonl(vars(p)) for p in PASSAGES)
    return PassageFile(write(tmp_path / f"passages.{request.param}", text))


def test_passages_in_order_and_from_any_place(passages):
    assert len(passages) == 3
    assert list(passages.read()) == PASSAGES
    assert list(passages.read(1)) == PASSAGES[1:]
    assert [passages[i] for i in (2, 0)] == [PASSAGES[2], PASSAGES[0]]


def test_passages_by_id(passages):
    assert [passages.find(p.id) for p in reversed(PASSAGES)] == PASSAGES[::-1]
    with pytest.raises(ValueError, match="has no passage '4': the embeddings are of another file"):
        passages.find("4")


def test_numbers_are_ids_and_a_title_may_be_missing(tmp_path):
    file = PassageFile(
        write(tmp_path / "p.jsonl", jsonl({"_id": 7, "text": "x"}, {"id": "8", "text": "", "title": None}))
    )
    assert list(file.read()) == [Passage("7", "", "x"), Passage("8", "", "")]
    assert file.num_empty == 1


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    file = PassageFile(write(tmp_path / "p.tsv", b"\xef\xbb\xbfid\ttext\ttitle\r\n1\ta\tb\r\n2\tc\td\r\n"))
    assert [file.find("2"), file[0]] == [Passage("2", "d", "c"), Passage("1", "b", "a")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"id": 1, "text": "a"}\n\n{"id": 2, "text"\n', "line 3: not JSON"),
        ("p.jsonl", '{"id": 1, "text": "\\ud83d"}\n', "line 1: .* half of a surrogate pair"),
        ("p.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("p.jsonl", '{"id": ' + "1" * 5000 + "}\n", "line 1: not JSON"),
        ("p.jsonl", '["a"]\n', "line 1: expected a JSON object, got list"),
        ("p.jsonl", '{"id": 1}\n', 'line 1: no "text"'),
        ("p.jsonl", '{"text": "a"}\n', 'line 1: no "id"'),
        ("p.jsonl", '{"id": true, "text": "a"}\n', '"id" should be a string'),
        ("p.jsonl", '{"id": 1, "text": ["a"]}\n', r'"text" should be a string, got \["a"\]'),
        ("p.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "text": "\xe9"}\n', "line 2: byte .* is not UTF-8"),
        ("p.jsonl", jsonl({"id": 1, "text": "a"}, {"id": "1", "text": "b"}), "lines 1 and 2 have the same id '1'"),
        ("p.tsv", "1\ta\tb\n2\tc\td\n1\te\tf\n", "lines 1 and 3 have the same id '1'"),
        ("p.tsv", "1\ta\tb\n2\tc\n", "line 2: 2 columns, expected 3"),
        (
            "p.tsv",
            '1\ta\tb\n2\t"a' + "\n1\tb\tc" * 30_000,
            r"lines 2 to 21848, which are one record: field .*\(131072\)$",
        ),
        ("p.tsv", "1\ta\tb\n2\t" + "c" * 140_000 + "\td\n", r"line 2: field larger than field limit \(131072\)$"),
        ("p.tsv", '1\ta\tb\n2\t"c\nd\te\tf\n', "lines 2 to 3, which are one record: 2 columns, expected 3: id, text,"),
        ("p.tsv", "1\ta\n2\tb\tc\n", "line 2: 3 columns, expected 2: id, text$"),
        ("p.tsv", "id\ttext\ttitle\n", "has no passages"),
        ("p.csv", "1,a,b\n", "expected a .tsv or .jsonl"),
    ],
)
def test_a_bad_file_is_one_clear_error(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PassageFile(write(tmp_path / name, text))


def test_two_columns_are_taken_as_they_are(tmp_path):
    lines = ['7\t"Wing" is a word , and "flow', '8\tof "heat" \'', '9\t"a ""b"" c"']  # collection.tsv of MS MARCO
    file = PassageFile(write(tmp_path / "collection.tsv", "\n".join(lines) + "\n"))
    assert list(file.read()) == [Passage(line[0], "", line[2:]) for line in lines]
    assert file.find("8").text == 'of "heat" \''


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_compressed_passages_are_the_same(ending, tmp_path):
    text = TSV if ending == "tsv" else jsonl(*map(vars, PASSAGES))
    plain = PassageFile(write(tmp_path / f"p.{ending}", text))
    packed = PassageFile(write(tmp_path / f"p.{ending}.gz", gzip.compress(text.encode())))
    assert list(packed.read()) == list(plain.read()) == PASSAGES and packed.crc == plain.crc
    assert list(packed.read(1)) == PASSAGES[1:]
    assert [packed.find(p.id) for p in reversed(PASSAGES)] == PASSAGES[::-1]
    for damaged in (gzip.compress(text.encode())[:-10], text.encode()):
        with pytest.raises(ValueError, match=r"p\..*\.gz is damaged: "):
            PassageFile(write(tmp_path / f"p.{ending}.gz", damaged))


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.hash", lambda value: 5)
    file = PassageFile(write(tmp_path / "p.tsv", TSV))
    assert [file.find(p.id) for p in PASSAGES] == PASSAGES
    with pytest.raises(ValueError, match="same id"):
        PassageFile(write(tmp_path / "q.tsv", TSV + "2\tagain\t\n"))


@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz", "jsonl.gz"])
def test_questions(ending, tmp_path):
    records = [{"question": "who?", "answers": ["me", "you"], "more": 1}, {"question": "x", "answers": []}]
    text = json.dumps(records) if "jsonl" not in ending else jsonl(*records)
    content = gzip.compress(text.encode()) if ending.endswith("gz") else text
    assert read_questions(write(tmp_path / f"q.{ending}", content)) == records


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "q.jsonl",
            jsonl({"question": "a", "answers": ["b"]}, {"question": "c"}),
            'line 2: "answers" should be a list',
        ),
        ("q.json", '[{"answers": []}]', 'entry 1: no "question"'),
        ("q.json", '{"question": "a"}', "expected a list of records, got dict"),
        ("q.json", "[1]", "entry 1: expected an object"),
        ("q.json", "[", "is damaged: Expecting value"),
        ("q.json", b'["\xff"]', "is damaged: 'utf-8' codec"),
        ("q.jsonl", "", "has no questions"),
        ("q.txt", "", "expected a .json or .jsonl"),
    ],
)
def test_bad_questions_are_one_clear_error(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / name, text))
