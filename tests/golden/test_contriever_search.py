"""Contriever's retrieval and evaluation against the golden vectors: texts, answers, passages, index, metrics.

Where the reference fills up missing results with the last passage, ours leaves them out. Training:
``test_contriever.py``.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from contriever.beir import K_VALUES, evaluate_queries, means
from contriever.encoder import Retriever, load_retriever
from contriever.eval_beir import as_run, dense_search, document_texts, evaluate_folder
from contriever.index.dense import DenseIndex, IndexSettings
from contriever.index.embeddings import Shard
from contriever.index.passages import PassageFile
from contriever.passage_retrieval import add_passages
from contriever.text.answers import has_answer, hits_within, tokenize
from contriever.text.normalize import clean, normalize
from tests.contriever.tiny import tiny_retriever
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("contriever")
OURS = ("has_answer", "tokenize", "calculate_matches", "normalize/", "passages/", "ir/", "beir/")
MAX_TOKENS, BATCH = 16, 2  # with which the passages were encoded


def test_exactly_the_characters_of_the_reference_change():
    changed = {chr(point): form for point, form in GOLDEN.json("normalize/char_map")}
    assert changed
    surrogates = range(0xD800, 0xE000)
    for character in (chr(point) for point in range(0x110000) if point not in surrogates):
        assert normalize(character) == changed.get(character, character)


def test_normalised_sentences():
    cases = GOLDEN.json("normalize/cases")
    assert cases
    assert [normalize(text) for text, _ in cases] == [expected for _, expected in cases]


def test_tokens_of_answer_matching():
    cases = GOLDEN.json("tokenize")
    assert cases
    for text, tokens, lowercase in cases:
        assert tokenize(text) == tokens
        assert [token.lower() for token in tokenize(text)] == lowercase


def test_answers_are_found_where_the_reference_finds_them():
    cases = GOLDEN.json("has_answer")
    assert cases
    assert [has_answer(answers, text) for answers, text, _ in cases] == [expected for _, _, expected in cases]


def test_counts_of_questions_with_a_hit():
    case = GOLDEN.json("calculate_matches")
    assert hits_within(case["hits"]).tolist() == case["top_k_hits"]
    assert np.array(case["hits"], dtype=bool).tolist() == case["questions_doc_hits"]


# --- Passages, embeddings, index and results --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    """The golden encoder."""
    tiny = tiny_retriever(tmp_path_factory.mktemp("tiny"), GOLDEN["vocab"].tolist(), GOLDEN.json("config"))
    tiny.model.load_state_dict(GOLDEN.state_dict("sd/"))
    return tiny


@pytest.fixture
def passages(tmp_path) -> PassageFile:
    path = tmp_path / "passages.tsv"
    path.write_text(GOLDEN.json("passages/tsv"))
    return PassageFile(path)


def test_passage_file(passages):
    expected = GOLDEN.json("passages/parsed")
    assert expected
    assert [{"id": p.id, "title": p.title, "text": p.text} for p in passages.read()] == expected


@pytest.mark.parametrize("lower", [0, 1])
@pytest.mark.parametrize("no_title", [0, 1])
def test_embeddings_of_passages(retriever, passages, lower, no_title):
    found = list(passages.read())
    assert [p.id for p in found] == GOLDEN.json(f"passages/ids_{lower}{no_title}")
    texts = [p.text if no_title else p.full_text() for p in found]
    vectors = retriever.encode(clean(texts, bool(lower), bool(lower)), BATCH, MAX_TOKENS, amp="fp32")
    np.testing.assert_allclose(vectors, GOLDEN[f"passages/emb_lower{lower}_notitle{no_title}"], rtol=0, atol=2e-5)


@pytest.fixture
def index(passages) -> DenseIndex:
    vectors = GOLDEN["passages/emb_lower0_notitle0"]
    return DenseIndex([Shard(Path("passages_00"), vectors, [p.id for p in passages.read()], {}, None)], IndexSettings())


def test_queries_and_search(retriever, index):
    queries = GOLDEN.json("passages/queries")
    vectors = retriever.encode(queries, BATCH, MAX_TOKENS, amp="fp32")
    np.testing.assert_allclose(vectors, GOLDEN["passages/qemb"], rtol=0, atol=2e-5)
    expected = GOLDEN["passages/top3_scores"]
    scores, rows = index.search(vectors, expected.shape[1])
    assert [[index.id(row) for row in of_query] for of_query in rows] == GOLDEN.json("passages/top3_ids")
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-3)


def test_more_results_than_passages_are_not_made_up(index):
    reference = GOLDEN.json("passages/top7_ids_on_5_docs")
    _, rows = index.search(GOLDEN["passages/qemb"], len(reference[0]))
    for of_query, theirs in zip(rows.tolist(), reference, strict=True):
        ours = [index.id(row) for row in of_query if row >= 0]
        assert ours == theirs[: len(index)]
        assert set(theirs[len(index) :]) <= {index.id(len(index) - 1)}  # the bug: the last passage, repeated


def test_result_record(index, passages):
    expected = GOLDEN.json("passages/result_jsonl_record0")
    record = {key: value for key, value in expected.items() if key != "ctxs"}
    row = GOLDEN.json("passages/queries").index(record["question"])
    scores, rows = index.search(GOLDEN["passages/qemb"][row : row + 1], len(expected["ctxs"]))
    (result,) = add_passages([record], scores, rows, index, passages, workers=1)
    assert list(result) == list(expected)
    for ours, theirs in zip(result.pop("ctxs"), expected.pop("ctxs"), strict=True):
        assert list(ours) == list(theirs)
        assert float(ours.pop("score")) == pytest.approx(float(theirs["score"]), abs=1e-3)
        assert isinstance(theirs.pop("score"), str) and ours == theirs
    assert result == expected


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_run_with_ties_and_a_query_without_results():
    expected = GOLDEN.json("ir/metrics")
    qrels = GOLDEN.json("ir/qrels")
    metrics = means(evaluate_queries(qrels, GOLDEN.json("ir/run")), len(qrels))
    assert {name: value / 100 for name, value in metrics.items()} == pytest.approx(expected, abs=1e-5)


def beir_cases() -> list[str]:
    return GOLDEN.cases("beir/")


@pytest.mark.parametrize("case", beir_cases())
def test_the_metrics_of_the_reference_are_those_that_we_report(case):
    theirs = GOLDEN.json(f"beir/{case}")
    assert theirs.keys() == evaluate_queries({"q": {"d": 1}}, {"q": {"d": 1.0}})["q"].keys()
    for k in K_VALUES:  # one query with results for every judged one: these are related
        assert theirs[f"R_cap@{k}"] >= theirs[f"Recall@{k}"] - 1e-9
        assert theirs[f"MRR@{k}"] <= 100 and theirs["MRR@1"] == theirs["P@1"]


@pytest.mark.slow
@pytest.mark.skipif("CRANFIELD" not in os.environ, reason="CRANFIELD names no folder with Cranfield in BEIR's layout")
@pytest.mark.parametrize("case", beir_cases())
def test_a_whole_evaluation_of_the_packaged_encoder(case):
    norms, score = case.split("_") if "_" in case else ("", case)
    assert score == "dot"
    norm_query, norm_document = ("q" in norms.removeprefix("norm"), "d" in norms.removeprefix("norm"))
    encoder = load_retriever()

    def search(dataset):
        queries = list(dataset.queries.values())
        return dense_search(
            encoder, document_texts(dataset), queries, 1001, 64, 512, norm_query, norm_document, amp="fp32"
        )

    metrics, _, _ = evaluate_folder(Path(os.environ["CRANFIELD"]), "test", lambda d: as_run(d, search(d)))
    assert metrics == pytest.approx(GOLDEN.json(f"beir/{case}"), abs=0.05)


def test_every_array_of_the_evaluations_was_compared():
    assert not [key for prefix in OURS for key in GOLDEN.unread(prefix)]
