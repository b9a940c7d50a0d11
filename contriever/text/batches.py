"""Texts of similar length in one batch, as arrays. No torch."""

from collections.abc import Iterator, Sequence

import numpy as np

MOST_TOKENS = {"cpu": 1024}  # of a forward pass whose activations stay in the caches


def padded(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, N), padded on the right to the longest, and their mask: True where there is a token."""
    lengths = np.array([len(sequence) for sequence in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    return ids, mask


def longest_first(
    sequences: Sequence[Sequence[int]], batch_size: int, most_tokens: int | None = None
) -> Iterator[list[int]]:
    """Rows of every batch, of at most ``batch_size`` texts and ``most_tokens``; what is too large shows at once."""
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable").tolist()
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        rows = batch_size if most_tokens is None else min(batch_size, max(1, most_tokens // longest))
        yield order[start : start + rows]
        start += rows
