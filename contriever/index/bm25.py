"""BM25, and its combination with dense retrieval: words that must match exactly, and meaning that need not."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ..text.words import terms
from .answers import Answers, nothing_found

K1, B = 1.5, 0.75  # of BM25
DECISIVE = 2 / 3  # share of a word in the weight of a query from which on words count in full


def word_weight(found: int, documents: int) -> float:
    """The weight of a word that so many of the documents hold (idf)."""
    return float(np.log1p((documents - found + 0.5) / (found + 0.5)))


def focus_of(weights: Sequence[float]) -> float:
    """How much words count beside meaning, in [0, 1]: in full where one word (a name, a number) decides, less in long
    questions, most of whose words are in the best answer by chance; from the share of the largest weight in all."""
    return min(1.0, max(weights) / sum(weights) / DECISIVE) if weights else 1.0


class BM25:
    """BM25 (Lucene's variant) over :func:`contriever.text.words.terms`, by bm25s.

    Args:
        texts: N documents; row numbers count through them.
    """

    def __init__(self, texts: Sequence[str]):
        # bm25s computes with JAX where that is installed, and JAX would take most of a GPU's memory for itself
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import bm25s

        self.texts = texts
        documents = [terms(text) for text in texts]
        self._found = Counter(word for document in documents for word in set(document))
        self.index = None
        if any(documents):  # bm25s cannot index texts without a single word
            self.index = bm25s.BM25(k1=K1, b=B)
            self.index.index(documents, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Of all documents, (N,) float32; 0 without a common word."""
        words = terms(query, single=False)
        if self.index is None or not words:
            return np.zeros(len(self.texts), np.float32)
        return self.index.get_scores(words).astype(np.float32)

    def focus(self, query: str) -> float:
        """See :func:`focus_of`."""
        words = terms(query, single=False)
        return focus_of([word_weight(self._found[word], len(self.texts)) for word in words if word in self._found])

    def search(self, queries: Sequence[str], k: int) -> Answers:
        """The k documents with the highest scores; fewer where fewer share a word with the query."""
        scores, rows = nothing_found(len(queries), k)
        if self.index is not None and len(queries):
            words = [terms(query, single=False) for query in queries]
            found = self.index.retrieve(words, k=min(k, len(self.texts)), show_progress=False, sorted=True)
            width = found.scores.shape[1]
            matching = found.scores > 0
            scores[:, :width] = np.where(matching, found.scores, -np.inf)
            rows[:, :width] = np.where(matching, found.documents, -1)
        return scores, rows


class JoinedTerms:
    """The same scores for one query at a time, from stored terms and without importing anything for it.

    Args:
        documents: Of :meth:`join`.
    """

    def __init__(self, documents: list[str]):
        self.documents = documents
        lengths = np.array([document.count(" ") for document in documents]) / 2
        self._norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1e-9)) if documents else lengths

    @staticmethod
    def join(text: str) -> str:
        """All terms of a text, each between two blanks of its own."""
        return "".join(f" {term} " for term in terms(text))

    def scores(self, query: str) -> tuple[np.ndarray, float]:
        """Of all documents, (N,) float32, 0 without a common word; and :func:`focus_of` the query."""
        total, weights = np.zeros(len(self.documents)), []
        for term in terms(query, single=False):
            counts = np.array([document.count(f" {term} ") for document in self.documents])
            if found := np.count_nonzero(counts):
                weights.append(word_weight(found, len(counts)))
                total += weights[-1] * counts / (counts + self._norm)
        return total.astype(np.float32), focus_of(weights)

    def with_words(self, words: Iterable[str]) -> np.ndarray:
        """Whether each document has all of these words in any form, (N,); stop words do not count."""
        rows = np.ones(len(self.documents), bool)
        for word in words:
            if terms(word):
                rows &= self.scores(word)[0] > 0
        return rows


def stretch(scores: np.ndarray, floor: float) -> np.ndarray:
    """Scores of one query from [floor, highest] to [0, 1]."""
    top = scores.max(initial=floor)
    return (scores - floor) / (top - floor) if top > floor else np.zeros_like(scores)


def combine(dense: np.ndarray, lexical: np.ndarray, dense_weight: float, unit: bool, focus: float) -> np.ndarray:
    """Weighted sum of the scores of the same documents by two retrievers, each stretched to [0, 1].

    The lowest value is that which a score can have (Bruch et al., "An Analysis of Fusion Functions for Hybrid
    Retrieval", 2023): 0 for BM25, -1 for inner products of vectors of length 1. Other inner products have none, and the
    lowest one of these documents takes its place.

    Args:
        dense_weight: In [0, 1].
        unit: Whether vectors had length 1.
        focus: Of the query, a factor of the lexical part; see :func:`focus_of`.
    """
    check_weight(dense_weight)
    floor = -1.0 if unit or not len(dense) else float(dense.min())
    return dense_weight * stretch(dense, floor) + (1 - dense_weight) * focus * stretch(lexical, 0.0)


def fuse(
    dense: Answers, lexical: Answers, k: int, dense_weight: float, unit: bool, focuses: Sequence[float]
) -> Answers:
    """:func:`combine` for the best documents of two retrievers.

    A document that BM25 has not found counts 0 for it; one that dense retrieval has not found counts as much as the
    worst that it has.
    """
    scores, rows = nothing_found(len(dense[0]), k)
    for q in range(len(rows)):
        by_row = [
            {row: score for score, row in zip(found[0][q].tolist(), found[1][q].tolist(), strict=True) if row >= 0}
            for found in (dense, lexical)
        ]
        worst = min(by_row[0].values(), default=0.0)
        candidates = np.array(sorted(by_row[0].keys() | by_row[1].keys()), dtype=int)
        columns = (
            np.array([found.get(row, missing) for row in candidates.tolist()], dtype=np.float32)
            for found, missing in zip(by_row, (worst, 0.0), strict=True)
        )
        total = combine(*columns, dense_weight, unit, focuses[q])
        order = np.argsort(-total, kind="stable")[:k]
        rows[q, : len(order)], scores[q, : len(order)] = candidates[order], total[order]
    return scores, rows


def check_weight(dense_weight: float) -> None:
    """Raise ``ValueError`` if it is no part of the whole."""
    if not 0 <= dense_weight <= 1:
        raise ValueError(f"--dense_weight must be in [0, 1], got {dense_weight}")
