"""The embeddings of the last epoch, and spherical k-means over those of all processes (DeepCluster-v2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.cluster_sums import nearest, sum_by_cluster

NOT_SEEN = -100  # label of images without an assignment; the cross-entropy ignores it


class MemoryBank:
    """The images that this process has seen in an epoch, and their embeddings, in the order of the loader.

    There is one bank for every crop whose embeddings are kept. Training overwrites the rows from the first on, so they
    are up to an epoch old.

    Args:
        num_images: Size of the data set.
        num_banks: Number of crops whose embeddings are kept.
        rows: M, images of this process in an epoch.
        dim: D, dimension of the embeddings.

    Attributes:
        indices: Of the images in the data set, int64, shape (M,).
        embeddings: Shape (num_banks, M, D), float32.
        is_filled: Whether every row has been written.
        assignments: Cluster of every image for each head by the last clustering, int64, shape (H, num_images), on the
            CPU and the same on every process; None before the first one.
    """

    assignments: Tensor | None = None

    def __init__(self, num_images: int, num_banks: int, rows: int, dim: int, device: torch.device | str = "cpu"):
        self.num_images, self.is_filled = num_images, False
        self.indices = torch.zeros(rows, dtype=torch.int64, device=device)
        self.embeddings = torch.zeros(num_banks, rows, dim, device=device)

    @torch.no_grad()
    def write(self, start: int, indices: Tensor, embeddings: Tensor) -> None:
        """Overwrite the rows from ``start`` on with a batch; rows that are not finite are left as they are.

        Args:
            indices: Shape (B,).
            embeddings: Shape (num_banks, B, D).
        """
        rows = slice(start, start + len(indices))
        good = embeddings.isfinite().all(dim=2).all(dim=0)
        self.indices[rows] = torch.where(good, indices.to(good.device, non_blocking=True), self.indices[rows])
        self.embeddings[:, rows] = torch.where(good[:, None], embeddings.float(), self.embeddings[:, rows])

    def state_dict(self) -> dict:
        """The memory of all ranks, ranks first, on rank 0; every rank must call this."""
        return {
            "indices": distributed.gather_on_main(self.indices),
            "embeddings": distributed.gather_on_main(self.embeddings),
            "assignments": self.assignments,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take this rank's share, unless the clusters are missing or the memory is that of a run of another shape."""
        rank, shape = distributed.get_rank(), (distributed.get_world_size(), *self.embeddings.shape)
        assignments = state.get("assignments")
        if assignments is None or assignments.shape[1] != self.num_images or state["embeddings"].shape != shape:
            return
        self.load_rows(state["indices"][rank], state["embeddings"][rank])
        self.assignments = assignments

    def load_rows(self, indices: Tensor, embeddings: Tensor) -> None:
        """Take this rank's memory, as from an official file.

        Raises:
            ValueError: If the memory has another shape.
        """
        if embeddings.shape != self.embeddings.shape:
            raise ValueError(
                f"the file holds a memory of shape {tuple(embeddings.shape)}, the flags make one of "
                f"{tuple(self.embeddings.shape)}"
            )
        self.indices.copy_(indices)
        self.embeddings.copy_(embeddings)
        self.is_filled = True


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
        assignments, _ = nearest(embeddings, centroids)
        sums = sum_by_cluster(embeddings, assignments, len(centroids), centroids.dtype)
        counts = torch.bincount(assignments, minlength=len(centroids))
        sums, counts = distributed.all_reduce_sum(sums), distributed.all_reduce_sum(counts)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
        centroids = F.normalize(centroids, dim=1)
    return nearest(embeddings, centroids)[0], centroids


def check_prototypes(number: int, rows: int) -> None:
    """``ValueError`` if a head has more prototypes than a process sees images in an epoch."""
    if number > rows:
        raise ValueError(f"--nmb_prototypes {number} is more than the {rows} images that a process sees in an epoch")


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
        check_prototypes(len(head.weight), len(embeddings))
        first = embeddings[order[: len(head.weight)].to(embeddings.device)]
        clusters, centroids = spherical_kmeans(embeddings, distributed.broadcast(first))
        head.weight.copy_(centroids)
        # numpy writes in order: where the sampler repeats an image, the last one counts on every process alike
        assignments[h].numpy()[indices] = distributed.all_gather(clusters).cpu().numpy()
    return assignments
