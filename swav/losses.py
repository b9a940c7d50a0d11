"""The objectives of Caron et al. 2020: swapped prediction of codes (SwAV) and its queue; DeepCluster-v2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.run.health import usage_of
from shared.sinkhorn import sinkhorn_knopp


@torch.no_grad()
def normalize_prototypes_(prototypes: nn.Linear) -> None:
    """Put every prototype (row of the weight) back on the unit sphere, in place: scores are cosines (Algorithm 1)."""
    prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))


@dataclass(frozen=True)
class SwappedPrediction:
    """Predict the code of a crop from the other crops of its image (section 3.1).

    Attributes:
        crops_for_assign: Indices of the crops that get a code.
        temperature: Of the softmax over prototypes that predicts a code.
        epsilon: Entropy regularisation of the codes.
        sinkhorn_iterations: Balancing steps behind the codes.
    """

    crops_for_assign: Sequence[int]
    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3

    def assign(self, scores: Tensor) -> Tensor:
        """Codes of a batch: soft assignments that use every prototype equally (eq. 3), both (B, K); rows sum to 1."""
        return sinkhorn_knopp(scores, self.epsilon, self.sinkhorn_iterations, max_abs_score=1.0)

    def __call__(self, scores: Tensor, codes: Sequence[Tensor]) -> Tensor:
        """Cross-entropy between the code of a crop and the predictions from all other crops (eq. 1 and 2, section 3.2).

        Args:
            scores: Cosines with the prototypes, crop by crop, shape (V, B, K).
            codes: Assignments (B, K) of the crops in ``crops_for_assign``; taken as constants.

        Returns:
            Mean over the codes, the V - 1 other crops and the batch; 0-d float32 tensor.
        """
        log_predictions = F.log_softmax(scores.float() / self.temperature, dim=2)
        loss = scores.new_zeros((), dtype=torch.float32)
        for code, crop in zip(codes, self.crops_for_assign, strict=True):
            others = torch.cat([log_predictions[:crop], log_predictions[crop + 1 :]])  # it never predicts its own code
            loss = loss - (code * others).sum(dim=2).mean()
        return loss / len(codes)


def cluster_classification(scores: Sequence[Tensor], assignments: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy between the cluster of an image and the predictions from all of its crops (DeepCluster-v2).

    Args:
        scores: For each head the cosines with its prototypes, crop-major, shape (V * B, K_h).
        assignments: Cluster of each image for each head, int64, shape (H, B); -100 where an image has none.
        temperature: Of the softmax over prototypes.

    Returns:
        Mean over the heads of the mean over all crops of images with a cluster (0 if there are none); 0-d float32.
    """
    losses = []
    for head_scores, clusters in zip(scores, assignments, strict=True):
        targets = clusters.repeat(len(head_scores) // len(clusters))
        total = F.cross_entropy(head_scores.float() / temperature, targets, ignore_index=-100, reduction="sum")
        losses.append(total / (targets >= 0).sum().clamp_min(1))
    return torch.stack(losses).mean()


class EmbeddingQueue:
    """The last embeddings of every crop that has a code, newest first (section 3.1, small batches).

    A batch that is small against the number of prototypes cannot use them all equally. Its codes are therefore computed
    together with those of the queue, once that has been filled.

    Args:
        num_codes: Number of crops that have a code.
        rows: Embeddings of each on this process, a multiple of the batch; 0: the queue is never used.
        dim: D, dimension of the embeddings.

    Attributes:
        embeddings: Shape (num_codes, rows, D), float32.
        has_started: Whether training has reached the queue's first epoch.
    """

    def __init__(self, num_codes: int, rows: int, dim: int, device: torch.device | str = "cpu"):
        self.embeddings = torch.zeros(num_codes, rows, dim, device=device)
        self.pushed = [0] * num_codes  # rows so far; counting them spares looking into the queue, which waits for a GPU
        self.has_started = False

    @property
    def is_used(self) -> bool:
        return self.has_started and self.embeddings.shape[1] > 0

    def is_full(self, i: int) -> bool:
        """Whether every row of the i-th crop's queue has been written."""
        return self.pushed[i] >= self.embeddings.shape[1]

    @torch.no_grad()
    def push(self, i: int, embeddings: Tensor) -> None:
        """Put a batch (B, D) of the i-th crop in front; the oldest rows fall out.

        Rows that are not finite are left as the newest ones before them: they would spoil the codes of many steps.
        """
        rows = len(embeddings)
        newest = self.embeddings[i, :rows]
        embeddings = torch.where(embeddings.isfinite().all(dim=1, keepdim=True), embeddings.float(), newest)
        self.embeddings[i] = torch.cat([embeddings, self.embeddings[i, :-rows]])
        self.pushed[i] += rows

    def load_rows(self, embeddings: Tensor) -> None:
        """Take this rank's queue (num_codes, rows, D) of an official file; rows of zeros have not been written."""
        if embeddings.shape != self.embeddings.shape:
            raise ValueError(
                f"the official queue file holds a queue of shape {tuple(embeddings.shape)}, the flags make one of "
                f"{tuple(self.embeddings.shape)}"
            )
        self.embeddings.copy_(embeddings)
        self.pushed = (embeddings.abs().sum(dim=2) > 0).sum(dim=1).tolist()
        self.has_started = True

    def state_dict(self) -> dict | None:
        """The queues of all ranks, None while they are not used; every rank must call this."""
        if not self.is_used:
            return None
        return {"embeddings": distributed.all_gather(self.embeddings[None]), "pushed": list(self.pushed)}

    def load_state_dict(self, state: dict) -> None:
        """Take this rank's share; the same rows on another number of processes are dealt out again by age.

        Args:
            state: Empty where the queue had not been used.

        Raises:
            ValueError: If the number of rows of all processes, of crops or of dimensions has changed.
        """
        if not state or self.embeddings.shape[1] == 0:
            return
        stored = state["embeddings"]  # (ranks, codes, rows, D)
        world_size, rank = distributed.get_world_size(), distributed.get_rank()
        num_codes, rows, dim = self.embeddings.shape
        if stored.shape != (len(stored), num_codes, world_size * rows // len(stored), dim):
            raise ValueError(
                f"the checkpoint's queues of shape {tuple(stored.shape)} do not fit {world_size} of shape "
                f"{tuple(self.embeddings.shape)}: --queue_length, --crops_for_assign or --feat_dim has changed"
            )
        by_age = stored.permute(1, 2, 0, 3).flatten(1, 2)
        self.embeddings.copy_(by_age[:, rank::world_size])
        self.pushed = [count * len(stored) // world_size for count in state["pushed"]]
        self.has_started = True


# --- Use of the prototypes --------------------------------------------------------------------------------------------


class PrototypeUsage:
    """Counts for every prototype the images that were assigned to it in this epoch, on all processes.

    Args:
        nmb_prototypes: K.
    """

    def __init__(self, nmb_prototypes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(nmb_prototypes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, codes: Tensor) -> None:
        """Count the likeliest prototype of every code (B, K); codes that are not finite count for none."""
        self.counts.index_add_(0, codes.argmax(dim=1), codes.isfinite().all(dim=1).long())

    def summary(self) -> dict[str, Tensor]:
        """:func:`usage_of` the counts of all processes, which must all call this."""
        return usage_of(distributed.all_reduce_sum(self.counts))

    def end_epoch(self) -> dict[str, int]:
        """``prototypes_used`` and ``dead_prototypes``; every process must call this. The next epoch counts from 0."""
        used = int(self.summary()["prototypes_used"])
        self.counts.zero_()
        return {"prototypes_used": used, "dead_prototypes": len(self.counts) - used}

    def state_dict(self) -> dict:
        """Counts of all processes, which must all call this."""
        return {"counts": distributed.all_reduce_sum(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting; an official checkpoint has no counts, its state is empty."""
        if state and distributed.is_main_process():
            self.counts.copy_(state["counts"])
