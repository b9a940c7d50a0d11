"""Sums of the rows of clusters, the step that every k-means shares."""

import torch
from torch import Tensor

BLOCK_ROWS = 1 << 14  # rows that are converted at once


def sum_by_cluster(rows: Tensor, clusters: Tensor, num_clusters: int, dtype: torch.dtype = torch.double) -> Tensor:
    """Sum of the rows of each cluster, in the same order every time: bit by bit the same on a GPU too.

    Args:
        rows: (N, d), any float type.
        clusters: The cluster of each row, int64, (N,).
        num_clusters: K.
        dtype: Of the sums; unit vectors add up well in float32, at a quarter of the cost.

    Returns:
        (K, d); zeros for clusters without rows.
    """
    sums = torch.zeros(num_clusters, rows.shape[1], dtype=dtype, device=rows.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for block, numbers in zip(rows.split(BLOCK_ROWS), clusters.split(BLOCK_ROWS), strict=True):
            sums.index_add_(0, numbers, block.to(dtype))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return sums
