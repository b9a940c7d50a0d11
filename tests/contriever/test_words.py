"""Lexical search: which words are the same, BM25, phrases, and its combination with vectors."""

import math

import numpy as np
import pytest

from contriever.index.bm25 import BM25, JoinedTerms, combine, fuse
from contriever.text.words import exact_words, find_terms, phrases, terms


def joined(texts: list[str]) -> JoinedTerms:
    return JoinedTerms([JoinedTerms.join(text) for text in texts])


def plain_bm25(documents: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25 from its formula."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for word in query:
            n = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = words.count(word)
            score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean_length))
        scores.append(score)
    return scores


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("invoice", "Invoices"),
        ("cafe", "CAFÉ"),
        ("cafe\u0301", "café"),
        ("Straße", "STRASSE"),
        ("c++", "C++,"),
        ("R", "r"),
    ],
)
def test_forms_of_a_word_are_one_term(one, other):
    assert terms(one) == terms(other) != []


@pytest.mark.parametrize(("one", "other"), [("C++", "C"), ("room 7", "room 8"), ("F#", "F"), ("2023-117", "2023-118")])
def test_short_words_and_numbers_tell_texts_apart(one, other):
    assert terms(one) != terms(other)


def test_terms_have_their_places_and_stop_words_have_none():
    text = "The naïve Cafés of a+b"
    assert [(text[a:b], term) for a, b, term in find_terms(text)] == [("naïve", "naiv"), ("Cafés", "cafe"), ("b", "b")]
    assert exact_words("The Cafés") == ["the", "cafes"]


def test_scripts_without_blanks_are_pairs_of_characters():
    assert terms("東京都", single=False) == ["東京", "京都"] and terms("猫", single=False) == ["猫"]
    assert set(terms("東京")) == {"東", "京", "東京"}
    assert terms("2024年の報告 final", single=False) == ["2024", "年の", "の報", "報告", "final"]
    texts = ["東京の天気", "京都の天気", "黒い猫"]
    tokyo, cat, weather = BM25(texts).search(["東京", "猫", "天気"], 2)[1].tolist()
    assert (tokyo, cat, set(weather)) == ([0, -1], [2, -1], {0, 1})


def test_bm25_against_its_formula():
    texts = ["wing flow wing", "heat flow body jet", "", "cone jet jet speed", "shock"]
    scores, rows = BM25(texts).search(["wing jet", "flow"], k=5)
    for q, query in enumerate(["wing jet", "flow"]):
        expected = plain_bm25([t.split() for t in texts], query.split())
        np.testing.assert_allclose(joined(texts).scores(query)[0], expected, rtol=1e-5)
        found = dict(zip(rows[q].tolist(), scores[q].tolist(), strict=True))
        found.pop(-1, None)
        assert found == pytest.approx({row: s for row, s in enumerate(expected) if s > 0}, rel=1e-5)
        assert (np.diff(scores[q][rows[q] >= 0]) <= 0).all()


@pytest.mark.parametrize("texts", [[], ["", ""], ["the", "of"]])
def test_bm25_over_nothing_finds_nothing(texts):
    scores, rows = BM25(texts).search(["wing"], k=2)
    assert rows.tolist() == [[-1, -1]] and np.isneginf(scores).all()
    assert joined(texts).scores("wing")[0].tolist() == [0] * len(texts)


def test_phrases_are_words_one_after_the_other():
    assert phrases('find "Oil of the Bike" and „Käse“ or “C++” ""') == [["oil", "of", "the", "bike"], ["kase"], ["c++"]]
    index = joined(["oil of the bike", "the bike of oil", "oils of the bike", "bikes"])
    assert index.with_words(["oil", "of", "the", "bike"]).tolist() == [True, True, True, False]
    assert index.with_words(["zebra"]).tolist() == [False] * 4 and index.with_words([]).all()


def test_scores_are_stretched_from_the_lowest_that_can_be():
    dense, lexical = np.array([0.6, -0.2, 0.2], np.float32), np.array([0, 3, 6], np.float32)
    expected = 0.25 * (dense + 1) / 1.6 + 0.75 * lexical / 6
    np.testing.assert_allclose(combine(dense, lexical, 0.25, True, 1.0), expected, rtol=1e-6)
    expected = 0.25 * (dense + 0.2) / 0.8 + 0.75 * 0.4 * lexical / 6
    np.testing.assert_allclose(combine(dense, lexical, 0.25, False, 0.4), expected, rtol=1e-6)
    assert combine(dense, np.zeros(3, np.float32), 0.0, True, 1.0).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="--dense_weight must be in"):
        combine(dense, lexical, 2.0, True, 1.0)


def test_what_one_retriever_has_not_found_is_no_better_than_its_worst():
    dense = np.array([[10.0, 6.0, 2.0]], np.float32), np.array([[4, 1, 2]])
    lexical = np.array([[3.0, 1.0, -np.inf]], np.float32), np.array([[1, 7, -1]])
    scores, rows = fuse(dense, lexical, 5, 0.6, False, [1.0])
    assert rows.tolist() == [[1, 4, 7, 2, -1]]
    np.testing.assert_allclose(scores[0, :4], [0.6 * 0.5 + 0.4, 0.6, 0.4 / 3, 0], atol=1e-6)
    assert np.array_equal(fuse(dense, lexical, 3, 1.0, False, [1.0])[1], dense[1])


def test_words_count_less_the_less_one_of_them_decides():
    texts = ["wing flow jet", "wing heat", "wing flow", "wing 117", "cone"]
    weights = [math.log(1 + (5 - n + 0.5) / (n + 0.5)) for n in (1, 4, 2)]  # of 117, wing, flow
    for query, expected in (("117", 1), ("117 zebra", 1), ("wing 117", 1), ("zebra", 1), ("", 1)):
        assert BM25(texts).focus(query) == joined(texts).scores(query)[1] == expected
    expected = max(weights) / sum(weights) * 3 / 2
    assert BM25(texts).focus("flow 117 of a wing") == pytest.approx(expected) and expected < 0.95
    assert joined(texts).scores("flow 117 of a wing")[1] == pytest.approx(expected)
