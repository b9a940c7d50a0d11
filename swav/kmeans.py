"""Spherical k-means over the embeddings of all processes (DeepCluster-v2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.clusters import sum_by_cluster

from .memory_bank import MemoryBank

NOT_SEEN = -100  # label of images without an assignment; the cross-entropy ignores it
ROWS_AT_A_TIME = 16384  # similarities of so many embeddings are in memory at once


@torch.no_grad()
def nearest_centroids(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid (K, D) with the largest dot product for each row of (M, D); the lowest one in a tie."""
    return torch.cat([(rows @ centroids.T).argmax(dim=1) for rows in embeddings.split(ROWS_AT_A_TIME)])


@torch.no_grad()
def spherical_kmeans(embeddings: Tensor, centroids: Tensor, num_iters: int = 10) -> tuple[Tensor, Tensor]:
    """Cluster unit vectors that are spread over the processes.

    Each iteration assigns every row to the centroid with the largest dot product and replaces the centroid by the
    normalised mean of its rows on all processes. A centroid without rows stays where it is.

    Args:
        embeddings: This process's rows, (M, D), float32.
        centroids: Where to start, (K, D), the same on every process.

    Returns:
        The cluster of each row, (M,), and the unit centroids (K, D), the same on every process.
    """
    for _ in range(num_iters):
        assignments = nearest_centroids(embeddings, centroids)
        sums = sum_by_cluster(embeddings, assignments, len(centroids), centroids.dtype)
        counts = torch.bincount(assignments, minlength=len(centroids))
        sums, counts = distributed.all_reduce_sum(sums), distributed.all_reduce_sum(counts)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
        centroids = F.normalize(centroids, dim=1)
    return nearest_centroids(embeddings, centroids), centroids


@torch.no_grad()
def cluster_memory(memory: MemoryBank, heads: Sequence[nn.Linear], orders: Sequence[Tensor]) -> Tensor:
    """Cluster the memory once for each head, and put the centroids into the heads as prototypes.

    Head h clusters bank h modulo the number of banks. Its first centroids are rows of rank 0's bank.

    Args:
        memory: Banks of this process.
        heads: Prototypes without bias, weights (K_h, D).
        orders: For each head a permutation of the memory's rows, whose first K_h are the first centroids.

    Returns:
        Cluster of every image for each head, int64, shape (H, num_images), on the CPU and the same on every process;
        ``NOT_SEEN`` for images that are not in the memory.

    Raises:
        ValueError: If a head has more prototypes than the memory of a process has rows.
    """
    assignments = torch.full((len(heads), memory.num_images), NOT_SEEN)
    indices = distributed.all_gather(memory.indices).cpu().numpy()
    for h, (head, order) in enumerate(zip(heads, orders, strict=True)):
        embeddings = memory.embeddings[h % len(memory.embeddings)]
        if len(head.weight) > len(embeddings):
            raise ValueError(
                f"--nmb_prototypes {len(head.weight)} is more than the {len(embeddings)} images that a process sees in "
                "an epoch"
            )
        first = embeddings[order[: len(head.weight)].to(embeddings.device)]
        clusters, centroids = spherical_kmeans(embeddings, distributed.broadcast(first))
        head.weight.copy_(centroids)
        # numpy writes in order: where the sampler repeats an image, the last one counts on every process alike
        assignments[h].numpy()[indices] = distributed.all_gather(clusters).cpu().numpy()
    return assignments
