"""Files of TREC and MS MARCO, compressed or not, give what BEIR's give; runs, metrics of queries, paired tests."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from contriever import compare_queries, eval_beir
from contriever.beir import evaluate_queries, means, read_beir, read_qrels, read_queries, read_run
from contriever.index.passages import Passage
from shared.run.log import read_log
from tests.contriever.test_eval_beir import DOCUMENTS, QRELS, QUERIES, write_dataset

TEXTS = {i: f"{title} {text}".strip() or "empty" for i, (title, text) in DOCUMENTS.items()}
TOPICS = """
<top>
<num> Number: q1
<title> shock wing

<desc> Description:
Which shocks?
</top>
<top>
<num> Number: q2 <title> Topic: w7
  wave <desc> </top>
<top><num>w1</num><title>w9 cone</title></top>
"""
XML = """<?xml version="1.0"?>
<topics task="x"><topic number="q1"><query>shock wing</query><question>q?</question></topic>
<topic number="q2" type="y"><query>w7 wave</query></topic><topic number="w1"><title>w9 cone</title></topic></topics>
"""


def write_trec(folder: Path) -> Path:
    """The data set of ``write_dataset`` with the names and formats of MS MARCO and TREC."""
    folder.mkdir()
    (folder / "collection.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in TEXTS.items()))
    (folder / "queries.dev.small.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in QUERIES.items()))
    (folder / "qrels.dev.small.tsv").write_text("".join(f"{q}\t0\t{d}\t{grade}\n" for q, d, grade in QRELS))
    (folder / "topics.2004.txt").write_text(TOPICS)
    (folder / "qrels.2004.txt").write_text("".join(f"{q} Q0  {d} {grade}\n" for q, d, grade in QRELS))
    return folder


def compress(folder: Path) -> Path:
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return folder


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_other_layouts_hold_the_same_data_set(packed, tmp_path):
    expected = read_beir(write_dataset(tmp_path / "beir"))
    if packed:
        compress(tmp_path / "beir")
        assert read_beir(tmp_path / "beir") == expected
    folder = write_trec(tmp_path / "trec")
    folder = compress(folder) if packed else folder
    for split in ("dev.small", "2004"):
        found = read_beir(folder, split)
        assert (found.queries, found.qrels) == (expected.queries, expected.qrels)
        assert found.documents == [Passage(i, "", text) for i, text in TEXTS.items()]


def test_topics_of_trec(tmp_path):
    for number, text in enumerate((TOPICS, XML)):
        (tmp_path / f"{number}.txt").write_text(text)
        found = [(query, words) for _, query, words in read_queries(tmp_path / f"{number}.txt")]
        assert found == [("q1", "shock wing"), ("q2", "w7 wave"), ("w1", "w9 cone")]
    (tmp_path / "0.txt").write_text("<top><num> 5 <title> a &lt; b </top><top><num> 6 </top>")
    with pytest.raises(ValueError, match=r"0\.txt, topic 2: no title"):
        list(read_queries(tmp_path / "0.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 0 d1 1\nq1 0 d2\n", "line 2: expected query id, 0, document id and an integer, got 'q1 0 d2'"),
        ("q1 0 d1 1\nq1 0 d2 0.5\n", "line 2: expected query id"),
        ("q1 0 d1 1\n\nq1 0 d1 2\n", "line 3: document 'd1' is judged twice for query 'q1': 1, 2"),
    ],
)
def test_bad_judgements_name_their_line(text, message, tmp_path):
    (tmp_path / "qrels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_qrels(tmp_path / "qrels.txt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.trec", "1 Q0 d1 1 2.5 x\n1 Q0 d1 2 2.0 x\n", "line 2: document 'd1' is there twice for query '1'"),
        ("a.trec", "1 Q0 d1 1 nan x\n", "line 1: the score of document 'd1' is no number"),
        ("a.trec", "1 Q0 d1 1 2.5\n", "line 1: expected query id, Q0, document id, rank, score and name, got"),
        ("a.trec", "\n", "holds no results"),
        ("a.jsonl", '{"query_id": "1", "results": {"d": "x"}}\n', "line 1: the score of document 'd' is no number"),
        ("a.jsonl", '{"query_id": "1", "NDCG@1": 5}\n', 'line 1: "results" should be an object'),
    ],
)
def test_bad_runs_name_their_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / name)


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz", "run.jsonl", "run.jsonl.gz"])
def test_runs_come_back_as_they_were_written(name, tmp_path):
    run = {"q1": {"d1": 2.25, "d2": -1e-9}, "q2": {"w1": float(np.float32(1 / 3))}}
    eval_beir.save_runs(tmp_path / name, {"toy": run})
    assert read_run(tmp_path / name) == run
    (tmp_path / name).unlink()
    if "trec" in name:
        with pytest.raises(ValueError, match="no room for blanks in the ids 'q1', 'd 1'"):
            eval_beir.save_runs(tmp_path / name, {"toy": {"q1": {"d 1": 1.0}}})
        assert not list(tmp_path.iterdir())


# --- Metrics ----------------------------------------------------------------------------------------------------------

GRADES = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"d": 1}, "q3": {"e": 1}, "q4": {"f": 1, "g": 3}}
RUN = {"q1": {"c": 3.0, "b": 2.0, "x": 1.5, "a": 1.0}, "q2": {"x": 2.0, "d": 1.0}, "q4": {}, "other": {"a": 1.0}}


def test_metrics_of_single_queries_by_their_formulas():
    found = evaluate_queries(GRADES, RUN, (1, 3, 10))
    assert list(found) == ["q1", "q2"]
    ideal = 2 + 1 / math.log2(3)
    expected = {
        "NDCG@10": (1 / math.log2(3) + 2 / math.log2(5)) / ideal,
        "MAP@10": (1 / 2 + 2 / 4) / 2,
        "Recall@3": 1 / 2,
        "P@3": 1 / 3,
        "MRR@10": 1 / 2,
        "MRR@1": 0.0,
        "R_cap@1": 0.0,
        "R_cap@3": 1 / 2,
        "Hole@3": 1 / 3,
        "Hole@10": 1 / 10,
    }
    assert {name: found["q1"][name] for name in expected} == pytest.approx(expected)


def test_complete_means_count_queries_without_results_as_nothing():
    found, complete = (means(evaluate_queries(GRADES, RUN, (10,)), 4, c) for c in (False, True))
    for name in ("NDCG@10", "MAP@10", "Recall@10", "P@10"):
        assert complete[name] == pytest.approx(found[name] * 2 / 4, abs=1e-3) and complete[name] > 0
    for name in ("MRR@10", "R_cap@10", "Hole@10"):
        assert complete[name] == found[name] > 0


def evaluate(folder: Path, *flags) -> dict[str, float]:
    command = ["--beir_dir", folder.parent, "--dataset", folder.name, "--output_dir", folder.parent / "out", *flags]
    return eval_beir.eval_beir(eval_beir.get_args_parser().parse_args(list(map(str, [*command, "--device", "cpu"]))))


def test_a_stored_run_is_evaluated_without_texts(tmp_path, capsys):
    folder = write_trec(tmp_path / "trec")
    run = tmp_path / "bm25.trec.gz"
    text = "q1 Q0 d2 1 3 x\nq1 Q0 d1 2 2 x\nw1 Q0 w1 1 5.0 x\nw1 Q0 d5 2 4.0 x\nz Q0 d1 1 1 x\n"
    run.write_bytes(gzip.compress(text.encode()))
    expected = evaluate(folder, "--split", "2004", "--run", run)
    assert expected["MAP@10"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)
    told = capsys.readouterr().out
    assert "1 queries have the id of a result, which is left out" in told
    assert "1 queries found nothing; they are skipped by nDCG, MAP, recall and P" in told
    for name in ("collection.tsv", "topics.2004.txt"):
        (folder / name).unlink()
    complete = evaluate(folder, "--split", "2004", "--run", run, "-c")
    assert complete["MAP@10"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 3, abs=1e-3)
    own = evaluate(folder, "--split", "2004", "--run", run, "--ignore_identical_ids", "off")
    assert own["MAP@10"] == pytest.approx(100 * (1 / 2 + 1 / 4) / 2)
    with pytest.raises(ValueError, match="--model_name_or_path has no effect with --run"):
        evaluate(folder, "--run", run, "--model_name_or_path", "x")


def test_metrics_of_single_queries_are_written_beside_their_means(tmp_path):
    folder = write_dataset(tmp_path / "toy")
    (tmp_path / "run.trec").write_text("q1 Q0 d2 1 3 x\nq1 Q0 d1 2 2 x\nw1 Q0 d5 1 5.0 x\n")
    metrics = evaluate(folder, "--run", tmp_path / "run.trec", "--complete")
    found = read_log(tmp_path / "out/toy.queries.jsonl")
    assert [line.pop("query_id") for line in found] == ["q1", "q2", "w1"]
    assert all(line.keys() == metrics.keys() for line in found) and not any(found[1].values())
    for name, value in metrics.items():
        assert np.mean([line[name] for line in found]) == pytest.approx(value, abs=1e-3)
    assert found[0]["NDCG@10"] == pytest.approx(100 / math.log2(3))


# --- Paired tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "shift"), [(9, 0.6), (12, 0.0), (40, 0.3), (300, 0.1)])
def test_paired_tests_agree_with_random_signs_and_with_scipy(count, shift):
    draw = np.random.default_rng(count)
    first, second = draw.normal(size=(2, count))
    first, second = first + shift, np.where(draw.random(count) < 0.2, first + shift, second)
    found = compare_queries.compare(first, second, permutations=20_000)
    sums = draw.choice([-1, 1], (20_000, count)) @ (first - second)
    as_large = np.abs(sums) >= abs((first - second).sum()) - 1e-9
    assert found["permutation"] == pytest.approx(as_large.mean(), abs=0.015)
    assert found["t"] == pytest.approx(stats.ttest_rel(first, second).pvalue)
    wins, losses = int((first > second).sum()), int((first < second).sum())
    assert (found["wins"], found["losses"], found["ties"]) == (wins, losses, count - wins - losses)
    assert found["sign"] == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert found["difference"] == pytest.approx(first.mean() - second.mean())


def test_equal_retrievers_do_not_differ():
    found = compare_queries.compare(np.array([0.3, 30.0]), np.array([0.1 + 0.2, 30.0]))
    assert found == {"difference": 0, "wins": 0, "losses": 0, "ties": 2, "t": 1, "permutation": 1, "sign": 1}


def test_files_of_two_retrievers_are_compared(tmp_path, capsys):
    for name, values in (("a", [10.0, 20.0, 30.0, 5.0]), ("b", [5.0, 15.0, 25.0, 5.0])):
        records = ({"query_id": f"q{i}", "NDCG@10": v, "P@1": 0.0} for i, v in enumerate(values))
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def run(*flags):
        return compare_queries.compare_queries(compare_queries.get_args_parser().parse_args(list(map(str, flags))))

    run(tmp_path / "a", tmp_path / "b", "--metrics", "NDCG@10", "P@1")
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["NDCG@10", "16.25", "12.50", "+3.75", "3/0/1", "0.05767", "0.25", "0.25"],
        ["P@1", "0.00", "0.00", "+0.00", "0/0/4", "1", "1", "1"],
    ]
    with pytest.raises(ValueError, match="--metrics MAP@5: query 'q0' has no such value, but NDCG@10, P@1"):
        run(tmp_path / "a", tmp_path / "b", "--metrics", "MAP@5")
    (tmp_path / "c").write_text('{"query_id": "q0", "NDCG@10": 1}\n')
    with pytest.raises(ValueError, match=r"are of different queries: 'q1' is in one of them"):
        run(tmp_path / "a", tmp_path / "c")
    (tmp_path / "twice").write_text(2 * (tmp_path / "c").read_text())
    with pytest.raises(ValueError, match=r"line 2: the id 'q0' stands in"):
        run(tmp_path / "twice", tmp_path / "c")
