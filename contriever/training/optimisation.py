"""The optimiser, its learning rates, the numbers of the loss, and sharpness-aware steps."""

import argparse
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.precision import Precision

from ..losses import inbatch_logits

ETA = 0.01  # of ASAM, so that weights of 0 move too


def build_optimizer(module: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW over all parameters in one group, biases and norms among them; the key encoder's never get a gradient."""
    betas = (args.beta1, args.beta2)
    return torch.optim.AdamW(
        module.parameters(), lr=0.0, betas=betas, eps=args.eps, weight_decay=args.weight_decay, fused=True
    )


def gradient_norms(optimizer: torch.optim.Optimizer) -> Tensor:
    """Of each tensor; the method does not clip."""
    return clip_grad_norm_per_tensor_(optimizer.param_groups[0]["params"], 0)


# --- Learning rates as parts of the peak, a function of the number of updates done before ----------------------------


def linear(step: int, warmup: int, total: int, min_ratio: float) -> float:
    """Linear warm-up, then linearly down to ``min_ratio`` at ``total``.

    As in the reference, the warm-up climbs to 1 - ``min_ratio`` only and the decay starts at 1, the first update has a
    rate of 0, and a warm-up of -1 is none.
    """
    if step < warmup:
        return (1 - min_ratio) * step / max(1, warmup)
    return max(0.0, 1.0 + (min_ratio - 1) * (step - warmup) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int, min_ratio: float) -> float:
    """Linear warm-up, then a quarter of a cosine (not half of one) down to ``min_ratio`` at ``total``."""
    if step < warmup:
        return step / warmup
    return min_ratio + (1 - min_ratio) * math.cos(math.pi / 2 * (step - warmup) / (total - warmup))


SCHEDULES = {"linear": linear, "cosine": cosine}


class Objective:
    """Numbers of the loss, under the names of their flags, and the learning rate of each step."""

    def __init__(self, args: argparse.Namespace):
        self.temperature, self.label_smoothing = args.temperature, args.label_smoothing
        self.norm_query, self.norm_doc = args.norm_query, args.norm_doc
        self.peak_lr, self.schedule = args.lr, SCHEDULES[args.scheduler]
        self.shape = args.warmup_steps, args.total_steps, args.lr_min_ratio

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set, and return, the learning rate of a step."""
        (group,) = optimizer.param_groups
        group["lr"] = self.peak_lr * self.schedule(step, *self.shape)
        return group["lr"]


def contrast(
    trained: nn.Module, texts: list[Tensor], objective: Objective, precision: Precision
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vectors of the questions and of the passages, scores, labels, and the loss: one softmax over all processes."""
    with precision.autocast():
        q, k = trained(*texts, objective.norm_query, objective.norm_doc)
    all_keys = distributed.all_gather_with_grad(k.float())
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    logits, labels = inbatch_logits(q, all_keys, objective.temperature, rank, world_size)
    return q, k, logits, labels, F.cross_entropy(logits, labels, label_smoothing=objective.label_smoothing)


class SharpnessAware:
    """Moves the weights to where the loss is highest within a small ball, and back (fine-tuning, section 4.4).

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021 (SAM); Kwon et al.,
    "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021.

    Args:
        parameters: Those that are trained.
        rho: Radius of the ball.
        adaptive: Measure distances in units of the weights' sizes (ASAM).
    """

    def __init__(self, parameters: Iterable[Tensor], rho: float, adaptive: bool):
        self.parameters = list(parameters)
        self.rho, self.adaptive = rho, adaptive
        self.old: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """w + rho T^2 g / |T g|, with the gradients g at hand and T = |w| + eta, or 1 without ``adaptive`` (eq. 3)."""
        parameters = [p for p in self.parameters if p.grad is not None]
        scales = [p.abs() + ETA if self.adaptive else torch.ones_like(p) for p in parameters]
        scaled = [scale * p.grad for scale, p in zip(scales, parameters, strict=True)]
        norm = torch.stack(torch._foreach_norm(scaled)).norm()
        self.old = [p.clone() for p in self.parameters]
        for p, scale, gradient in zip(parameters, scales, scaled, strict=True):
            p.add_(scale * gradient * (self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def descend(self) -> None:
        """Back to where :meth:`ascend` began, bit for bit."""
        torch._foreach_copy_(self.parameters, self.old)
        self.old = []
