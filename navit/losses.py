"""Losses of packed images: of their labels, per image, and of pairs with texts, over all processes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shared import distributed


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy summed over the classes: (E, K), (E,) -> (E,)."""
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


def mean_over_processes(losses: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of the (valid) losses (E,) of all processes together, if their gradients are averaged afterwards."""
    valid = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    total = distributed.all_reduce_sum(valid.sum()).clamp_min(1)
    return distributed.get_world_size() * torch.where(valid, losses, 0.0).sum() / total


def log_sum_exp(rows: Tensor, columns: Tensor, valid: Tensor, temperature: Tensor) -> Tensor:
    """Of the similarities of each row with the valid columns: (E, D), (M, D), (M,) -> (E,)."""
    return (temperature * rows @ columns.T).masked_fill(~valid, -torch.inf).logsumexp(dim=1)


def contrastive_loss(images: Tensor, texts: Tensor, valid: Tensor, temperature: Tensor, chunks: int = 1) -> Tensor:
    """Symmetric softmax loss of pairs on all processes (section 2.2), without ever holding all their similarities.

    A process has the rows of its own pairs (E, D), equally many on every process, and the columns of all in so many
    chunks, each computed anew in the backward pass; their number changes nothing. Only ``valid`` pairs count.
    """
    counts, losses = distributed.all_gather(valid), -temperature * (images * texts).sum(dim=1)
    for rows, others in ((images, texts), (texts, images)):
        columns = distributed.all_gather_with_grad(others)
        parts = [
            checkpoint(log_sum_exp, rows, part, counted, temperature, use_reentrant=False)
            for part, counted in zip(columns.chunk(chunks), counts.chunk(chunks), strict=True)
        ]
        losses = losses + torch.stack(parts).logsumexp(dim=0) / 2
    return mean_over_processes(losses, valid)
