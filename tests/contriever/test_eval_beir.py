"""BEIR's layout, exact search and metrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from contriever import eval_beir
from contriever.beir import evaluate_queries, means, read_beir, read_run
from contriever.eval_beir import as_run, dense_search, evaluate_folder, get_args_parser
from tests.contriever.tiny import tiny_retriever
from tests.processes import run_processes

DOCUMENTS = {
    "d1": ("Wing", "flow of the wing in the shock"),
    "d2": ("", "heat of a thin body"),
    "d3": ("", ""),
    "w1": ("Jet", "mach wave w7"),
    "d5": ("", "the cone w9 , speed and pressure"),
}
QUERIES = {"q1": "shock wing", "q2": "w7 wave", "w1": "w9 cone", "unjudged": "plate"}
QRELS = [("q1", "d1", 2), ("q1", "d2", 0), ("q2", "w1", 1), ("w1", "d5", 1), ("w1", "gone", 1)]


def write_dataset(folder: Path, **changes: str) -> Path:
    files = {
        "corpus.jsonl": [json.dumps({"_id": i, "title": t, "text": x}) for i, (t, x) in DOCUMENTS.items()],
        "queries.jsonl": [json.dumps({"_id": i, "text": x, "metadata": {}}) for i, x in QUERIES.items()],
        "qrels/test.tsv": ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in QRELS)],
    }
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    for name, content in changes.items():
        (folder / {"corpus": "corpus.jsonl", "qrels": "qrels/test.tsv"}[name]).write_bytes(content.encode())
    return folder


@pytest.fixture(scope="module")
def beir(tmp_path_factory) -> Path:
    """A folder with the data set ``toy`` and an encoder."""
    folder = tmp_path_factory.mktemp("beir")
    write_dataset(folder / "toy")
    tiny_retriever(folder / "model").save(folder / "model")
    return folder


def run(beir: Path, output_dir: Path, *flags: str) -> dict[str, float]:
    command = ["--model_name_or_path", str(beir / "model"), "--beir_dir", str(beir), "--dataset", "toy"]
    args = get_args_parser().parse_args([*command, "--output_dir", str(output_dir), "--device", "cpu", *flags])
    return eval_beir.eval_beir(args)


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_only_judged_queries_are_read_and_surprises_are_told(beir):
    dataset = read_beir(beir / "toy")
    assert list(dataset.queries) == ["q1", "q2", "w1"]
    assert dataset.qrels["w1"] == {"d5": 1, "gone": 1}
    assert [d.full_text() for d in dataset.documents][:2] == [
        "Wing flow of the wing in the shock",
        "heat of a thin body",
    ]
    assert dataset.describe() == [
        "toy: 5 documents, 3 judged queries",
        "toy: 1 documents are empty",
        "toy: 1 judged documents are not in the collection",
        "toy: 1 queries have the id of a document, which is left out of their results",
    ]


def test_a_judgement_may_be_repeated_and_lines_end_as_on_windows(tmp_path):
    folder = write_dataset(tmp_path, qrels="query-id\tcorpus-id\tscore\r\nq1\td1\t2\r\nq1\td1\t2\r\n")
    assert read_beir(folder).qrels == {"q1": {"d1": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}'}, "line 2: the id 'a' stands in .*line 1"),
        ({"corpus": '{"text": "a"}'}, 'line 1: no "id"'),
        ({"corpus": "\n"}, r"corpus\.jsonl is empty"),
        ({"qrels": "q1\td1\t1\n"}, "line 1: expected a header"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\n"}, "line 2: expected query id, document id and an integer"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t0.5\n"}, "line 2: expected query id"),
        (
            {"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t0\n"},
            "line 3: document 'd1' is judged twice .* 1, 0",
        ),
        ({"qrels": "query-id\tcorpus-id\tscore\nq9\td1\t1\n"}, "judges the query 'q9'"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "has no judgements"),
    ],
)
def test_a_bad_data_set_is_one_clear_error(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_beir(write_dataset(tmp_path, **changes))


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_a_run_without_judged_queries_is_an_error():
    with pytest.raises(ValueError, match="no query has both"):
        means(evaluate_queries({"q": {"a": 1}}, {"p": {"a": 1.0}, "q": {}}), 1)


# --- Search -----------------------------------------------------------------------------------------------------------


def search_on_rank(rank: int, folder: Path, texts: list[str], queries: list[str]):
    """Scores in falling order, and by text: equal texts come in any order."""
    retriever = tiny_retriever(folder / str(rank))
    scores, rows = map(torch.from_numpy, dense_search(retriever, texts, queries, len(texts), 2, max_length=64))
    return scores, torch.full_like(scores, torch.nan).scatter(1, rows.long(), scores)


@pytest.mark.parametrize("normalized", [False, True])
def test_search_equals_the_matrix_product(tmp_path, monkeypatch, normalized):
    monkeypatch.setattr(eval_beir, "CHUNK", 3)
    encoder = tiny_retriever(tmp_path)
    texts, queries = [f"w{i} wing " * (i % 5) for i in range(11)], list(QUERIES.values())
    scores, rows = dense_search(encoder, texts, queries, 9, 2, 64, normalized, normalized)
    q, d = (encoder.encode(t, max_length=64, normalize=normalized, amp="fp32") for t in (queries, texts))
    products = q @ d.T
    np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :9], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(products, rows, axis=1), scores, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == 9 for row in rows.tolist())


def test_two_processes_find_what_one_finds(tmp_path):
    texts, queries = [f"w{i} wing " * (i % 5) for i in range(11)], list(QUERIES.values())
    alone = search_on_rank(0, tmp_path / "alone", texts, queries)
    for found in run_processes(search_on_rank, 2, tmp_path, texts, queries):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_vectors_that_are_not_finite_are_an_error(tmp_path):
    encoder = tiny_retriever(tmp_path)
    encoder.model.embeddings.LayerNorm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="vector of query 0 is not finite"):
        dense_search(encoder, ["a"], ["b"])


def test_a_query_never_finds_the_document_with_its_own_id(beir):
    rows = np.array([[0, 1, 2, 3, 4]] * 3), np.array([[3, 4, 0, 1, 2]] * 3)

    dataset, found = read_beir(beir / "toy"), (-rows[0].astype(np.float32), rows[1])
    found_by_query = as_run(dataset, found)
    assert "w1" in found_by_query["q1"] and list(found_by_query["w1"]) == ["d5", "d1", "d2", "d3"]
    assert "w1" in as_run(dataset, found, ignore_identical_ids=False)["w1"]


def test_a_folder_of_data_sets_is_averaged(tmp_path):
    write_dataset(tmp_path / "cqa" / "a")
    write_dataset(tmp_path / "cqa" / "b", qrels="query-id\tcorpus-id\tscore\nq1\td2\t1\n")

    def retrieve(dataset):
        return {query: {"d1": 2.0, "d2": 1.0} for query in dataset.queries}

    metrics, runs, per_query = evaluate_folder(tmp_path / "cqa", "test", retrieve)
    assert list(runs) == list(per_query) == ["a", "b"]
    of_a, of_b = (evaluate_folder(tmp_path / "cqa" / name, "test", retrieve)[0] for name in "ab")
    assert metrics["NDCG@10"] == pytest.approx((of_a["NDCG@10"] + of_b["NDCG@10"]) / 2)
    eval_beir.save_runs(tmp_path / "runs.jsonl", runs)
    ids = [json.loads(line)["query_id"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert ids == ["a/q1", "a/q2", "a/w1", "b/q1"]
    stored = read_run(tmp_path / "runs.jsonl")
    assert evaluate_folder(tmp_path / "cqa", "test", lambda d: eval_beir.run_of(d, stored))[:2] == (metrics, runs)


# --- The script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid"])
def test_the_script_writes_metrics_and_results(beir, tmp_path, retriever):
    path = tmp_path / "results" / "runs.jsonl"
    metrics = run(beir, tmp_path, "--retriever", retriever, "--save_results_path", str(path))
    assert json.loads((tmp_path / "toy.json").read_text()) == metrics
    results = {r["query_id"]: r["results"] for r in map(json.loads, path.read_text().splitlines())}
    assert list(results) == ["q1", "q2", "w1"] and "w1" not in results["w1"]
    if retriever == "bm25":
        assert metrics["MRR@1"] == 100 and list(results["q2"]) == ["w1"]


def test_results_in_other_formats_hold_the_same(beir, tmp_path):
    run(beir, tmp_path, "--save_results_path", str(tmp_path / "run.pt"), "--score_function", "cos_sim")
    run(beir, tmp_path, "--save_results_path", str(tmp_path / "run.trec"), "--norm_query", "--norm_doc")
    results = torch.load(tmp_path / "run.pt", weights_only=True)
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert all(line[1] == "Q0" and len(line) == 6 for line in lines)
    assert {(q, d): float(s) for q, _, d, _, s, _ in lines} == pytest.approx(
        {(q, d): s for q, scores in results.items() for d, s in scores.items()}
    )
    assert max(s for scores in results.values() for s in scores.values()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "none"), "none is not in the layout of BEIR"),
        (("--text_maxlength", "100"), "--text_maxlength 100: .* reads at most 64 tokens"),
        (("--per_gpu_batch_size", "0"), "--per_gpu_batch_size 0 is less than 1"),
        (("--retriever", "hybrid", "--dense_weight", "2"), "--dense_weight must be in"),
    ],
)
def test_bad_flags(beir, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(beir, tmp_path, *flags)
