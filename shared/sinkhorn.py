"""Balanced assignments by the Sinkhorn-Knopp iteration (Cuturi 2013), on one process or many."""

import math

import torch
from torch import Tensor

from . import distributed

# Largest |logarithm| for which the matrix, two scaling vectors of its spread and their products stay normal numbers
SCALING_LIMIT = {torch.float32: 25.0, torch.float64: 200.0}


@torch.no_grad()
def sinkhorn_knopp(
    scores: Tensor, epsilon: float = 0.05, num_iters: int = 3, max_abs_score: float | None = None
) -> Tensor:
    """Soft assignments of samples to prototypes that use the prototypes about equally.

    Starting from exp(scores / epsilon), each iteration scales every prototype to the mass B / K over the samples of all
    processes, then every sample to mass 1. Samples are therefore exactly normalised (rows sum to 1), prototypes
    approximately. With no iteration only the total mass is normalised, to B.

    The matrix is exp(scores / epsilon) scaled by a vector per side, so a half iteration reads it once. Where that would
    leave the range of float32 it is done in float64, and beyond the range of that the same iteration runs on
    logarithms. Either way an iteration costs one collective; one more comes before the first unless ``max_abs_score``
    is given.

    Args:
        scores: Shape (B / W, K), any float type; the rows of this process.
        epsilon: Entropy regularisation, in units of the scores.
        num_iters: Number of iterations.
        max_abs_score: A bound on the absolute scores known beforehand, e.g. 1 for cosines. It saves looking for their
            range, which is a reduction over processes and, on a GPU, a synchronisation.

    Returns:
        Assignments of this process's rows, shape (B / W, K), float32. NaN scores give NaN.

    Raises:
        ValueError: If ``epsilon`` is not positive or ``num_iters`` is negative.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if num_iters < 0:
        raise ValueError(f"num_iters must not be negative, got {num_iters}")
    scores = scores.float()
    low, high = _range(scores) if max_abs_score is None else (-max_abs_score, max_abs_score)
    middle = (low + high) / 2
    spread = (high - middle) / epsilon
    with torch.autocast(scores.device.type, enabled=False):  # its products would be rounded to half precision
        for dtype, limit in SCALING_LIMIT.items():
            if spread <= limit:
                return _scale(scores.to(dtype), middle, epsilon, num_iters).float()
        return _scale_logarithms(scores, middle, epsilon, num_iters)


def _range(scores: Tensor) -> tuple[float, float]:
    """Least and largest score of all processes."""
    low, high = scores.aminmax()
    extremes = distributed.all_gather(torch.stack([low, high])[None])
    return extremes[:, 0].min().item(), extremes[:, 1].max().item()


def _scale(scores: Tensor, middle: float, epsilon: float, num_iters: int) -> Tensor:
    num_samples, num_prototypes = len(scores) * distributed.get_world_size(), scores.shape[1]
    kernel = scores.sub(middle).mul_(1 / epsilon) if middle else scores * (1 / epsilon)
    kernel.exp_()
    if num_iters == 0:
        return kernel.mul_(num_samples / distributed.all_reduce_sum(kernel.sum()))
    samples = kernel.new_ones(len(kernel))
    for _ in range(num_iters):
        prototypes = (num_samples / num_prototypes) / distributed.all_reduce_sum(samples @ kernel)
        samples = 1 / (kernel @ prototypes)
    return kernel.mul_(prototypes).mul_(samples[:, None])


def _scale_logarithms(scores: Tensor, middle: float, epsilon: float, num_iters: int) -> Tensor:
    num_samples, num_prototypes = len(scores) * distributed.get_world_size(), scores.shape[1]
    kernel = (scores.double() - middle) / epsilon  # at 1e4, float64 keeps 1e-12 of a difference, float32 only 1e-3
    if num_iters == 0:
        return (kernel + math.log(num_samples) - _logsumexp_over_processes(kernel.logsumexp(dim=(0, 1)))).exp_().float()
    samples = kernel.new_zeros(len(kernel), 1)
    for _ in range(num_iters):
        mass = _logsumexp_over_processes((kernel + samples).logsumexp(dim=0))
        prototypes = math.log(num_samples / num_prototypes) - mass
        samples = -(kernel + prototypes).logsumexp(dim=1, keepdim=True)
    return kernel.add_(prototypes).add_(samples).exp_().float()


def _logsumexp_over_processes(logarithms: Tensor) -> Tensor:
    return distributed.all_gather(logarithms[None]).logsumexp(dim=0)
