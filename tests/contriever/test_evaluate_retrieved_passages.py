"""Answer matching and top-k accuracy on result files."""

import json

import pytest

from contriever.evaluate_retrieved_passages import evaluate_retrieved_passages, get_args_parser
from contriever.text import answers
from contriever.text.answers import match_questions


def test_processes_find_what_one_process_finds(monkeypatch):
    questions = [(["b c"], [f"a b {letter}" for letter in "abcd"])] * 30
    expected = match_questions(questions)
    monkeypatch.setattr(answers, "PASSAGES_PER_WORKER", 1)
    assert match_questions(questions, workers=2) == expected == [[False, False, True, False]] * 30


def result(answers, *texts) -> str:
    return json.dumps({"question": "?", "answers": answers, "ctxs": [{"text": text} for text in texts]}) + "\n"


def run(pattern) -> dict:
    return evaluate_retrieved_passages(get_args_parser().parse_args(["--data", str(pattern)]))


def test_accuracies_are_printed_as_the_reference_prints_them(tmp_path, capsys):
    texts = ["no"] * 25
    (tmp_path / "a.jsonl").write_text(result(["x"], "x", *texts) + result(["x"], *texts[:9], "X!", *texts[:9]))
    (tmp_path / "b.jsonl").write_text(result(["x"], *texts[:7]))
    found = run(tmp_path / "*.jsonl")
    assert list(found.values()) == [{5: 50.0, 10: 100.0, 20: 100.0}, {5: 0.0}]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert capsys.readouterr().out.splitlines() == [
        f"{a}: R@5: 50.0 R@10: 100.0 R@20: 100.0",
        f"{b}: R@5: 0.0",
        f"{a}\t{b}",
        "100.0\t-",
        "-\t-",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"answers": "x", "ctxs": []}', '"answers" should be a list of strings'),
        ('{"answers": ["x"]}', '"ctxs" should be a list of passages'),
        ('{"answers": ["x"], "ctxs": [{"title": "a"}]}', 'line 1: no "text"'),
    ],
)
def test_a_bad_file_is_one_clear_error(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        run(tmp_path / "*.json")
