"""The order of a cross-encoder of sentence-transformers, for the best documents of a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from contriever.index.rerank import CrossEncoder, rerank
from shared.run.log import read_log
from tests.contriever.test_collections import evaluate
from tests.contriever.test_eval_beir import DOCUMENTS, QUERIES, write_dataset
from tests.contriever.tiny import VOCABULARY, write_tokenizer
from tests.processes import run_processes

TEXTS = {i: f"{title} {text}".strip() for i, (title, text) in DOCUMENTS.items()}
RUN = {q: {d: 20.0 - i for i, d in enumerate(TEXTS)} for q in ("q1", "q2")} | {"w1": {}}


def write_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """A BERT with random weights and a head of ``labels`` scores."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(VOCABULARY), num_labels=labels, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder, VOCABULARY)
    return folder


@torch.inference_mode()
def logits(folder: Path, query: str, text: str) -> float:
    """By transformers alone."""
    model, tokenizer = (c.from_pretrained(folder) for c in (BertForSequenceClassification, AutoTokenizer))
    return model.eval()(
        **tokenizer([query], [text], return_tensors="pt")
    ).logits.item()  # a pair, also of an empty text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    return write_cross_encoder(tmp_path_factory.mktemp("cross"))


def test_the_best_documents_get_the_order_of_the_cross_encoder(folder):
    found = rerank(RUN, QUERIES, TEXTS, CrossEncoder(str(folder)), top=3, batch_size=2)
    assert found["w1"] == {}
    for query in ("q1", "q2"):
        documents, scores = list(found[query]), list(found[query].values())
        expected = {d: logits(folder, QUERIES[query], TEXTS[d]) for d in list(TEXTS)[:3]}
        assert documents[:3] == sorted(expected, key=expected.get, reverse=True) and documents[3:] == list(TEXTS)[3:]
        np.testing.assert_allclose(scores[:3], sorted(expected.values(), reverse=True), atol=1e-5)
        np.testing.assert_allclose(scores[3:], [scores[2] - 1, scores[2] - 2])
    assert list(found["q1"])[:3] != list(TEXTS)[:3] or list(found["q2"])[:3] != list(TEXTS)[:3]


def rerank_on_rank(rank: int, folder: Path) -> dict:
    return rerank(RUN, QUERIES, TEXTS, CrossEncoder(str(folder)), top=3)


def test_two_processes_share_the_queries(folder):
    alone = rerank_on_rank(0, folder)
    for found in run_processes(rerank_on_rank, 2, folder):
        assert list(found) == list(alone)
        for query in alone:
            assert found[query] == pytest.approx(alone[query]) and list(found[query]) == list(alone[query])


def test_the_script_reranks_a_search_and_a_stored_run(folder, tmp_path):
    dataset = write_dataset(tmp_path / "toy")
    plain = ["--retriever", "bm25", "--save_results_path"]
    evaluate(dataset, *plain, tmp_path / "bm25.trec")
    reranked = evaluate(dataset, *plain, tmp_path / "a.jsonl", "--rerank", folder)
    stored = ["--run", tmp_path / "bm25.trec", "--save_results_path", tmp_path / "b.jsonl"]
    assert evaluate(dataset, *stored, "--rerank", folder) == reranked
    assert read_log(tmp_path / "a.jsonl") == read_log(tmp_path / "b.jsonl")
    for line in read_log(tmp_path / "a.jsonl"):
        for document, score in line["results"].items():
            assert score == pytest.approx(logits(folder, QUERIES[line["query_id"]], TEXTS[document]), abs=1e-5)


def test_what_cannot_rerank_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="gives 3 scores per document: it is a classifier"):
        CrossEncoder(str(write_cross_encoder(tmp_path, labels=3))).scores("wing", ["heat", "jet"])
    with pytest.raises(ValueError, match="the document 'd1' of query 'q1' is not in the collection"):
        rerank(RUN, QUERIES, {}, CrossEncoder(str(folder)))
    with pytest.raises(
        ValueError, match=r"--rerank no/where is neither .* cache; --allow_download asks the hub for it"
    ):
        CrossEncoder("no/where")
