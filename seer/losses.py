"""SEER's objective: SwAV's swapped assignments, with the balancing of the published SSL library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.optimisation.larc import local_part


@torch.no_grad()
def normalize_prototypes_(layers: Sequence[nn.Linear]) -> None:
    """Put every prototype back on the unit sphere, in place: scores are cosines."""
    for weight in (local_part(layer.weight) for layer in layers):  # processes share rows, each of them whole
        weight.copy_(F.normalize(weight, dim=1))


@torch.no_grad()
def balance(matrix: Tensor, iterations: int, power: float = 0.0, hard: bool = False) -> Tensor:
    """Assignments that use all prototypes as they are meant to be used (Sinkhorn-Knopp).

    Each iteration gives every prototype its share of the mass, over the samples of all processes, then every sample an
    equal one. Infinities count as the largest finite entry; where a prototype has no mass at all, 1e-12 is added to
    every entry.

    Args:
        matrix: Not negative, shape (K, B): exponentials of the scores of this process's samples.
        power: Shares fall with the number k = 1, 2, ... of the prototype as k^-power; 0: equal.
        hard: All of a sample to its likeliest prototype.

    Returns:
        Assignments (B, K); rows sum to 1.
    """
    finite = torch.where(matrix.isfinite(), matrix, 0.0)
    largest = distributed.all_gather(finite.amax()[None]).amax()
    matrix = torch.where(matrix.isinf(), largest, matrix)  # NaN stays NaN
    matrix = matrix / distributed.all_reduce_sum(matrix.sum())
    share = torch.arange(1, len(matrix) + 1, device=matrix.device, dtype=matrix.dtype) ** -power
    share = share / share.sum()
    samples = matrix.shape[1] * distributed.get_world_size()
    for _ in range(iterations):
        mass = distributed.all_reduce_sum(matrix.sum(dim=1))
        floor = torch.where((mass == 0).any(), 1e-12, 0.0).to(matrix.dtype)
        matrix = (matrix + floor) * (share / (mass + floor * samples))[:, None]
        matrix = matrix / (samples * matrix.sum(dim=0))
    if hard:
        return F.one_hot(matrix.argmax(dim=0), len(matrix)).to(matrix.dtype)
    return (matrix / matrix.sum(dim=0)).T


@dataclass(frozen=True)
class SwappedAssignments:
    """Predict the assignment of a crop from every other crop of its image.

    Attributes:
        crops_for_assign: Indices of the crops that get an assignment.
        temperature: Of the softmax that predicts one.
        epsilon: Entropy regularisation.
        iterations, power: Of :func:`balance`, in float64 if ``double``.
        hard_steps: First steps, in which assignments are hard.
    """

    crops_for_assign: Sequence[int] = (0, 1)
    temperature: float = 0.1
    epsilon: float = 0.03
    iterations: int = 10
    hard_steps: int = 0
    power: float = 0.0
    double: bool = False

    @torch.no_grad()
    def assign(self, scores: Tensor, step: int = 0) -> Tensor:
        """Assignments of the scores (B, K) of one crop; constants, shape (B, K), float32."""
        logits = (scores.double() if self.double else scores.float()) / self.epsilon
        if not self.double:  # the exponentials of all processes are at most 1
            logits = logits - distributed.all_gather(logits.amax()[None]).amax()
        with torch.autocast(scores.device.type, enabled=False):
            return balance(logits.exp().T, self.iterations, self.power, step < self.hard_steps).float()

    def __call__(self, scores: Tensor, assignments: Sequence[Tensor]) -> Tensor:
        """Mean over the assignments of the mean cross-entropy of the predictions from all other crops.

        Args:
            scores: Cosines with the prototypes, crop by crop, (V, B, K).
            assignments: Of the crops in ``crops_for_assign``, each (B, K).
        """
        log_predictions = F.log_softmax(scores.float() / self.temperature, dim=2)
        losses = []
        for crop, assigned in zip(self.crops_for_assign, assignments, strict=True):
            others = torch.cat([log_predictions[:crop], log_predictions[crop + 1 :]])
            losses.append(-(assigned * others).sum(dim=2).mean())
        return torch.stack(losses).mean()


def learning_rate(
    progress: float, start: float, peak: float, end: float, warmup: float, rescaled: bool = False
) -> float:
    """A linear warm-up, then half a cosine.

    Args:
        progress: Share of the run that is done, in [0, 1).
        warmup: Share of the run.
        rescaled: The cosine begins at the end of the warm-up; otherwise it is that of the whole run, whose first part
            the warm-up replaces, as the papers have it.
    """
    if progress < warmup:
        return start + (peak - start) * progress / warmup
    if rescaled:
        progress = (progress - warmup) / (1 - warmup)
    return end + (peak - end) / 2 * (1 + math.cos(math.pi * progress))
