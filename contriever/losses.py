"""Contrastive learning with a queue (MoCo) and with the negatives of the batch (sections 3.2 and 3.3)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.optimisation.optim import ema_update_


class MoCo(nn.Module):
    """The query encoder, its moving average that encodes the keys, and the queue of old keys.

    Names of the entries are those of the published checkpoints.

    Args:
        encoder: Starts both.
        momentum: Of the key encoder.
    """

    def __init__(self, encoder: nn.Module, queue_size: int, momentum: float = 0.999):
        super().__init__()
        self.momentum = momentum
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        # unit length, unlike the keys of a BERT: the loss is near 0 until the queue has been filled once
        self.register_buffer("queue", F.normalize(torch.randn(encoder.config.hidden_size, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Move the key encoder towards the query encoder (eq. 2), parameters only."""
        ema_update_(self.encoder_k.parameters(), self.encoder_q.parameters(), self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys with those of all processes (B, D); keys that are not finite change nothing."""
        size = self.queue.shape[1]
        if size % len(keys):
            raise ValueError(f"--queue_size {size} is not a multiple of the {len(keys)} texts of one step")
        places = self.queue_ptr + torch.arange(len(keys), device=keys.device)  # to read the number waits for a GPU
        keys = keys.detach().to(self.queue.dtype).T
        new = torch.where(keys.isfinite().all(), keys, self.queue.index_select(1, places))
        self.queue.index_copy_(1, places, new)
        self.queue_ptr.add_(len(places)).remainder_(size)


class InBatch(nn.Module):
    """One encoder for queries and keys; both get a gradient.

    The forward pass takes token ids and masks of queries (B, N) and of keys (B', N'), and returns their vectors.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        q_ids: Tensor,
        q_mask: Tensor,
        k_ids: Tensor,
        k_mask: Tensor,
        norm_query: bool = False,
        norm_doc: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return self.encoder(q_ids, q_mask, normalize=norm_query), self.encoder(k_ids, k_mask, normalize=norm_doc)


def moco_logits(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Scores of each query with its own key and with the queue (eq. 1).

    Args:
        q, k: Vectors (B, D).
        queue: Old keys, (D, K).

    Returns:
        Scores (B, 1 + K) in float32, and labels (B,): all 0.
    """
    q, k = q.float(), k.float()
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ queue.float()], dim=1) / temperature
    return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)


def inbatch_logits(
    q: Tensor, all_keys: Tensor, temperature: float, rank: int, world_size: int
) -> tuple[Tensor, Tensor]:
    """Scores of each query with the keys of all processes (eq. 1).

    Args:
        q: This process's queries, (B, D).
        all_keys: Keys of all processes in rank order, (world_size * B', D); the first B of each process belong to its
            queries, further ones are negatives only.

    Returns:
        Scores (B, world_size * B') in float32, and labels (B,).
    """
    logits = (q.float() / temperature) @ all_keys.float().T
    return logits, torch.arange(len(q), device=q.device) + rank * (len(all_keys) // world_size)


def batch_statistics(logits: Tensor, labels: Tensor, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """What the log states: accuracy in percent, and the mean over dimensions of the spread of queries and of keys."""
    return {
        "accuracy": 100 * (logits.argmax(dim=1) == labels).float().mean(),
        "stdq": q.detach().float().std(dim=0).mean(),
        "stdk": k.detach().float().std(dim=0).mean(),
    }
