"""Balanced assignments by the Sinkhorn-Knopp iteration (Cuturi 2013), on one process or many."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import distributed

# Largest |logarithm| for which the matrix, two scaling vectors of its spread and their products stay normal numbers
SCALING_LIMIT = 25.0
# Largest |logarithm| of a scaling vector that is not yet absorbed into the matrix; an iteration adds log(B K) at most
ABSORPTION_LIMIT = 10.0
SMALLEST = -80.0  # exponents below do not count, and subnormal numbers would slow every later product down
BLOCK_SIZE = 1 << 17  # entries: in float64 they stay in a core's cache


@torch.no_grad()
def sinkhorn_knopp(
    scores: Tensor, epsilon: float = 0.05, num_iters: int = 3, max_abs_score: float | None = None
) -> Tensor:
    """Soft assignments of samples to prototypes that use the prototypes about equally.

    Starting from exp(scores / epsilon), each iteration scales every prototype to the mass B / K over the samples of all
    processes, then every sample to mass 1. Samples are therefore exactly normalised (rows sum to 1), prototypes
    approximately. With no iteration only the total mass is normalised, to B.

    The matrix is exp(scores / epsilon) scaled by a vector per side, so a half iteration reads it once. Where that would
    leave the range of float32, the scaling is absorbed into the exponents. Either way an iteration costs one
    collective; one more comes before the first unless ``max_abs_score`` is given.

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
    with torch.autocast(scores.device.type, enabled=False):  # its products would be rounded to half precision
        if (high - low) / (2 * epsilon) <= SCALING_LIMIT:
            return _scale(scores, (low + high) / 2, epsilon, num_iters)
        return _scale_with_absorption(scores, epsilon, num_iters)


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


def _scale_with_absorption(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The iteration for any range of scores (Schmitzer, "Stabilized sparse scaling algorithms", 2019, section 3.1).

    The logarithms of the scaling vectors are kept in float64, and the matrix is exp(scores / epsilon + both of them) in
    float32. From the first iteration on every sample has an entry of 1 and every prototype one of at least 1 / B, so
    what underflows does not count; the vectors by which later iterations scale this matrix are small numbers, and are
    absorbed before they grow.
    """
    num_samples, num_prototypes = len(scores) * distributed.get_world_size(), scores.shape[1]
    log_mass = _log_mass_of_prototypes(scores, epsilon)
    if num_iters == 0:
        log_total = math.log(num_samples) - log_mass.logsumexp(dim=0)
        kernel, _ = _matrix(scores, epsilon, log_total.expand(num_prototypes), log_total.new_zeros(len(scores)))
        return kernel
    log_prototypes = math.log(num_samples / num_prototypes) - log_mass
    kernel, log_samples = _matrix(scores, epsilon, log_prototypes)
    samples, prototypes = 1 / kernel.sum(dim=1), kernel.new_ones(num_prototypes)
    on_cpu = scores.device.type == "cpu"
    for _ in range(num_iters - 1):
        # the sums over processes need equal scalings of prototypes, which are known to all; samples are each one's own
        # a GPU always absorbs: to ask it would make the host wait
        has_grown = not on_cpu or prototypes.log().abs().max() > ABSORPTION_LIMIT
        if has_grown or samples.log().abs().max() > ABSORPTION_LIMIT:
            log_prototypes = log_prototypes + prototypes.log() if has_grown else log_prototypes
            kernel, log_samples = _matrix(scores, epsilon, log_prototypes, log_samples + samples.log())
            samples = torch.ones_like(samples)
        prototypes = (num_samples / num_prototypes) / distributed.all_reduce_sum(samples @ kernel)
        samples = 1 / (kernel @ prototypes)
    return kernel.mul_(prototypes).mul_(samples[:, None])


def _blocks(scores: Tensor) -> Iterator[slice]:
    """Rows that stay in the cache of a core; a GPU takes all of them at once."""
    num_rows = max(1, BLOCK_SIZE // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    return (slice(start, start + num_rows) for start in range(0, len(scores), num_rows))


def _log_mass_of_prototypes(scores: Tensor, epsilon: float) -> Tensor:
    """Logarithm of the sum of exp(scores / epsilon) over the samples of all processes, (K,), float64."""
    largest = scores.amax(dim=0)
    mass = sum(
        scores[rows].sub(largest).mul_(1 / epsilon).clamp_(min=SMALLEST).exp_().sum(dim=0) for rows in _blocks(scores)
    )
    return distributed.all_gather((largest.double() / epsilon + mass.log())[None]).logsumexp(dim=0)


def _matrix(
    scores: Tensor, epsilon: float, log_prototypes: Tensor, log_samples: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """exp(scores / epsilon + log_prototypes + log_samples) in float32, with exponents in float64.

    Without ``log_samples`` they are chosen, and returned, such that the largest entry of every sample is 1.
    """
    matrix, chosen = torch.empty_like(scores), []
    for rows in _blocks(scores):
        # at 1e4, float64 keeps 1e-12 of a difference, float32 only 1e-3
        exponents = scores[rows].double().mul_(1 / epsilon).add_(log_prototypes)
        chosen.append(-exponents.amax(dim=1) if log_samples is None else log_samples[rows])
        matrix[rows] = exponents.add_(chosen[-1][:, None])
        matrix[rows].clamp_(min=SMALLEST).exp_()
    return matrix, torch.cat(chosen)
