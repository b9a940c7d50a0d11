"""What a retriever finds: scores and row numbers, whoever computed them."""

from collections.abc import Sequence

import numpy as np

Answers = tuple[np.ndarray, np.ndarray]  # scores and rows, each (Q, k), best first, -inf and -1 for none


def nothing_found(queries: int, k: int) -> Answers:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1)


def merge(answers: Sequence[Answers], k: int) -> Answers:
    """The best k of several answers (Q, any) to the same queries; equal scores in the order of their rows."""
    scores, rows = (np.concatenate(column, axis=1) for column in zip(*answers, strict=True))
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
