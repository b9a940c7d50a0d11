"""Mr. TyDi and MKQA to the formats that the evaluations read."""

import json

import pytest

from contriever import convertmrtydi2beir, preprocess_xmkqa
from contriever.beir import read_beir
from contriever.index.passages import read_questions
from tests.contriever.test_collections import compress


def write_mrtydi(folder):
    (folder / "collection").mkdir()
    (folder / "topic.tsv").write_text("1\tnani ni rais?\r\n2\tlini?\n")
    (folder / "collection" / "docs.jsonl").write_text(
        '{"id": "26#0", "contents": "rais"}\n{"id": "7", "contents": ""}\n'
    )
    (folder / "qrels.test.txt").write_text("1 Q0 26#0 1\n")
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_mrtydi_becomes_a_data_set_of_beir(packed, tmp_path):
    (tmp_path / "in").mkdir()
    folder = write_mrtydi(tmp_path / "in")
    convertmrtydi2beir.convert(compress(folder) if packed else folder, tmp_path / "sw")
    dataset = read_beir(tmp_path / "sw")
    assert dataset.queries == {"1": "nani ni rais?"} and dataset.qrels == {"1": {"26#0": 1}}
    assert [(d.id, d.title, d.text) for d in dataset.documents] == [("26#0", "", "rais"), ("7", "", "")]
    lines = (tmp_path / "sw" / "queries.jsonl").read_text().splitlines()
    assert [json.loads(line)["_id"] for line in lines] == ["1", "2"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("topic.tsv", "1 nani\n", "line 1: 1 columns, expected 2"),
        ("qrels.test.txt", "1 Q0 26#0 1\n1 Q0 26#0\n", "line 2: expected query id, 0, document id"),
        ("collection/docs.jsonl", '{"id": "1"}\n', 'line 1: no "contents"'),
        ("collection/docs.jsonl", None, r"there is no .*docs\.jsonl"),
    ],
)
def test_a_bad_folder_of_mrtydi_is_one_clear_error(file, content, message, tmp_path):
    write_mrtydi(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        convertmrtydi2beir.convert(tmp_path, tmp_path / "out")


def mkqa(example_id: int, *answers: dict) -> str:
    queries = {"en": f"q{example_id}", "zh_cn": "问"}
    return (
        json.dumps({"example_id": example_id, "queries": queries, "answers": {"en": list(answers), "zh_cn": []}}) + "\n"
    )


def test_mkqa_keeps_questions_with_short_answers(tmp_path):
    (tmp_path / "mkqa.jsonl").write_text(
        mkqa(5, {"type": "entity", "text": "Curie", "aliases": ["M. Curie"]}, {"type": "long_answer", "text": "x"})
        + mkqa(6, {"type": "binary", "text": "yes"}, {"type": "unanswerable", "text": None})
        + mkqa(7, {"type": "date", "text": "1903"})
    )
    assert preprocess_xmkqa.convert(tmp_path / "mkqa.jsonl", tmp_path / "out") == {"en": 2, "zh_cn": 2}
    assert read_questions(tmp_path / "out" / "zh_cn.jsonl") == [
        {"id": 5, "lang": "zh_cn", "question": "问", "answers": ["M. Curie", "Curie"]},
        {"id": 7, "lang": "zh_cn", "question": "问", "answers": ["1903"]},
    ]


def test_another_file_is_no_mkqa(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="line 1: not a record of MKQA"):
        preprocess_xmkqa.convert(tmp_path / "x.jsonl", tmp_path / "out")
