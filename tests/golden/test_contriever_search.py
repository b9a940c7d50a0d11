"""Text normalisation, answer matching and metrics of Contriever's evaluations against measured values."""

import numpy as np
import pytest

from contriever.answer_matching import has_answer, hits_within, tokenize
from contriever.beir_metrics import evaluate_run
from contriever.normalize_text import normalize
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("contriever")
OURS = ("has_answer", "tokenize", "calculate_matches", "normalize/", "ir/")


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


def test_metrics_of_a_run_with_ties_and_a_query_without_results():
    expected = GOLDEN.json("ir/metrics")
    metrics = evaluate_run(GOLDEN.json("ir/qrels"), GOLDEN.json("ir/run"))
    assert {name: value / 100 for name, value in metrics.items()} == pytest.approx(expected, abs=1e-5)


def test_every_array_of_the_evaluations_was_compared():
    assert not [key for prefix in OURS for key in GOLDEN.unread(prefix)]
