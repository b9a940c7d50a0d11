"""The embeddings of the last epoch, which DeepCluster-v2 clusters instead of extracting new ones."""

import torch
from torch import Tensor

from shared import distributed


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
        self.indices[rows] = torch.where(good, indices.to(self.indices.device), self.indices[rows])
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
