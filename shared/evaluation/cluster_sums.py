"""Sums of the rows of clusters, the step that every k-means shares."""

import torch
import torch.nn.functional as F
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


def sum_by_cluster_on_cpu(rows: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """:func:`sum_by_cluster` of float32 rows on a CPU at a sixth of its cost: float32 in a block, float64 over blocks.

    Neither the number of threads nor anything else changes a bit of it.
    """
    sums = torch.zeros(num_clusters, rows.shape[1], dtype=torch.double)
    for block, numbers in zip(rows.split(BLOCK_ROWS), clusters.split(BLOCK_ROWS), strict=True):
        starts = numbers.bincount(minlength=num_clusters).cumsum(0).roll(1)
        starts[0] = 0
        sums += F.embedding_bag(numbers.argsort(stable=True), block, starts, mode="sum")
    return sums
