"""Average precision of a ranking."""

import numpy as np


def average_precision(places: np.ndarray, num_positives: int) -> float:
    """Area under the precision-recall curve by the trapezoidal rule, in [0, 1].

    Args:
        places: 0-based ranks at which positives were found, ascending, shape (n,).
        num_positives: How many there are, found or not.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (np.asarray(places) + 1)
    return float((before + after).sum() / 2 / num_positives)
