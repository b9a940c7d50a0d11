"""The two steps that every k-means here shares: the nearest centroid of each row, the sum of each cluster's rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 1 << 14  # rows that are converted at once
BLOCK_SCORES = 1 << 26  # of rows and centroids, held in memory together: 256 MiB
BLOCK_SCORES_ON_CPU = 1 << 18  # so few stay in a core's cache between their product and the search for the largest


def nearest(rows: Tensor, centroids: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The centroid with the largest dot product with each row; the lowest one in a tie.

    Args:
        rows, centroids: (N, d) and (K, d), of one float type.
        offsets: Added to the dot products, (K,). With -|c|^2 / 2 the centroid is the one at the least distance, as
            |x - c|^2 = |x|^2 - 2 (xc - |c|^2 / 2); None: zero.

    Returns:
        The centroid of each row, int64, (N,), and its score, (N,).
    """
    on_cpu, found, scores_found = rows.device.type == "cpu", [], []
    for block in rows.split(max(1, (BLOCK_SCORES_ON_CPU if on_cpu else BLOCK_SCORES) // len(centroids))):
        scores = block @ centroids.t() if offsets is None else torch.addmm(offsets, block, centroids.t())
        # on a CPU torch's search is six times slower
        index = torch.from_numpy(scores.numpy().argmax(axis=1)) if on_cpu else scores.argmax(dim=1)
        found.append(index)
        scores_found.append(scores.gather(1, index[:, None])[:, 0])
    return torch.cat(found), torch.cat(scores_found)


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
