"""BM25, and its combination with dense retrieval: words that must match exactly, and meaning that need not."""

import os
from collections.abc import Sequence

# bm25s computes with JAX where that is installed, and JAX would take most of a GPU's memory for itself
os.environ.setdefault("JAX_PLATFORMS", "cpu")
import bm25s
import numpy as np


class BM25:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over lowercase words without English stop words, by bm25s.

    Args:
        texts: N documents; row numbers count through them.
    """

    def __init__(self, texts: Sequence[str]):
        self.size = len(texts)
        tokens = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
        self.index = None
        if tokens.vocab and any(tokens.ids):  # bm25s cannot index texts without a single word
            self.index = bm25s.BM25()
            self.index.index(tokens, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents with the highest scores.

        Returns:
            Scores (Q, k) float32, best first, and row numbers (Q, k) int64; -inf and -1 where fewer documents share a
            word with the query.
        """
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        if self.index is not None and len(queries):
            words = bm25s.tokenize(list(queries), stopwords="en", show_progress=False, return_ids=False)
            found = self.index.retrieve(words, k=min(k, self.size), show_progress=False, sorted=True)
            width = found.scores.shape[1]
            matching = found.scores > 0
            scores[:, :width] = np.where(matching, found.scores, -np.inf)
            rows[:, :width] = np.where(matching, found.documents, -1)
        return scores, rows


def fuse(
    dense: tuple[np.ndarray, np.ndarray], lexical: tuple[np.ndarray, np.ndarray], k: int, dense_weight: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of the scores of two retrievers, each stretched to [0, 1] over its answers to the query.

    A document that only one of them has found counts 0 for the other (Bruch et al., "An analysis of fusion functions
    for hybrid retrieval", 2022).

    Args:
        dense, lexical: (scores, rows), each (Q, any), -inf and -1 for none.
        dense_weight: In [0, 1].

    Returns:
        (scores, rows), each (Q, k), best first, -inf and -1 for none.
    """
    check_weight(dense_weight)
    scores, rows = np.full((len(dense[0]), k), -np.inf, np.float32), np.full((len(dense[0]), k), -1)
    for q in range(len(rows)):
        total = {}
        for (all_scores, all_rows), weight in ((dense, dense_weight), (lexical, 1 - dense_weight)):
            found = all_rows[q] >= 0
            for row, score in zip(all_rows[q][found].tolist(), stretch(all_scores[q][found]).tolist(), strict=True):
                total[row] = total.get(row, 0.0) + weight * score
        best = sorted(total, key=lambda row: (-total[row], row))[:k]
        rows[q, : len(best)] = best
        scores[q, : len(best)] = [total[row] for row in best]
    return scores, rows


def check_weight(dense_weight: float) -> None:
    """Raise ``ValueError`` if it is no part of the whole."""
    if not 0 <= dense_weight <= 1:
        raise ValueError(f"--dense_weight must be in [0, 1], got {dense_weight}")


def stretch(scores: np.ndarray) -> np.ndarray:
    """Scores of one query from [min, max] to [0, 1]; all 1 when they are equal."""
    if not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
